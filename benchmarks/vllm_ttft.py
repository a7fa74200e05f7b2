"""Time to the first token at long prompts: vLLM with the plugin beside vLLM without, in turns on one machine.

    make test-vllm PYTEST_ARGS=--collect-only      # makes .venv-vllm
    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/vllm_ttft.py --out benchmarks/records/vllm_ttft.jsonl

Every engine is a process of its own with the reference model. In a turn all are asked for one token after the same prompt.
Each turn has another prompt, and begins with another engine. The first turn warms up, and is not counted. A record holds the
times of one engine, its ratio to stock, and what was approximated. Beside the time on the clock it has the time of the
processor, of all threads together: other programs on the machine prolong the first, and hardly the second.
"""

import argparse
import json
import os
import platform
import statistics
from contextlib import ExitStack
from pathlib import Path

import torch
from served_engine import Engine

from hyperattention import __version__
from hyperattention.reference.text import held_out_text


def ask_in_turns(options: dict[str, dict | None], length: int, chunk: int, turns: int) -> dict[str, list[dict]]:
    """Return the answers of all engines, turn by turn."""
    text, names = held_out_text(), list(options)
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                Engine(each, max_model_len=length, max_num_batched_tokens=chunk, enable_prefix_caching=False)
            )
            for name, each in options.items()
        }
        answers = {name: [] for name in names}
        for turn in range(turns + 1):
            prompt = list(text[turn * 1000 : turn * 1000 + length - 1])
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                answers[name].append(engines[name].ask(prompt, 1) | {"load": os.getloadavg()[0]})
                print(turn, name, f"{answers[name][-1]['seconds']:.1f} s", flush=True)
    return answers


def compare(ours: list[float], stock: list[float], prefix: str) -> dict:
    """Summarise the times of one engine, and its ratio to stock: of the medians, and quartiles of the turns' ratios."""
    ratios = [a / b for a, b in zip(ours, stock, strict=True)]
    return {
        f"{prefix}seconds": [round(each, 3) for each in ours],
        f"{prefix}median_s": round(statistics.median(ours), 3), f"{prefix}quartiles_s": quartiles(ours),
        f"{prefix}ratio": round(statistics.median(ours) / statistics.median(stock), 4),
        f"{prefix}ratio_quartiles": quartiles(ratios),
    }  # fmt: skip


def quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(low, 4), round(high, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=7, help="at least 2")
    parser.add_argument("--methods", nargs="+", default=["default", "lean"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.turns < 2:
        parser.error("--turns must be at least 2: quartiles need several")
    import vllm

    options = {"stock": None} | {name: {"method": name} for name in asked.methods}
    answers = ask_in_turns(options, asked.length, asked.chunk, asked.turns)
    for name, found in answers.items():
        counted, stock = found[1:], answers["stock"][1:]
        times = {
            prefix: [[each[f"{prefix}seconds"] for each in engine] for engine in (counted, stock)] for prefix in ("", "cpu_")
        }
        record = {
            "engine": name, "length": asked.length, "chunk": asked.chunk, "turns": asked.turns,
            **compare(*times[""], ""), **compare(*times["cpu_"], "cpu_"),
            # calls of each prompt
            "approximated": found[-1]["prompts"]["calls"] - found[-2]["prompts"]["calls"],
            "share_of_pairs": round(found[-1]["prompts"]["share_of_pairs"], 4),
            "same_token_as_stock": sum(a["tokens"] == b["tokens"] for a, b in zip(counted, stock, strict=True)),
            "threads": os.environ.get("OMP_NUM_THREADS"), "load": [round(each["load"], 1) for each in counted],
            "machine": platform.machine(), "cores": os.cpu_count(),
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "hyperattention": __version__},
        }  # fmt: skip
        print(json.dumps(record))
        if asked.out:
            with asked.out.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
