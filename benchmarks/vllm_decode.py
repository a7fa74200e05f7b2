"""Decoding by the best pages in vLLM: hidden digits found, and time per token, beside stock in turns on one machine.

    make test-vllm PYTEST_ARGS=--collect-only      # makes .venv-vllm
    .venv-vllm/bin/python benchmarks/vllm_decode.py --out benchmarks/records/vllm_decode.jsonl

Every engine is a process of its own with the reference model, and reads the same document once, exactly. Then all are asked
the same questions: a prompt ends before the sign between a key and its digits, so that every digit is decoded. For the
times, the engines generate in turns after the whole document; a prompt alone is subtracted.
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
from hyperattention.reference.samples import samples_of_documents
from hyperattention.reference.text import held_out_documents

BLOCK = 128


def engine_of(length: int, decode: dict | None) -> Engine:
    """Start an engine, and approximate decoding alone."""
    options = None if decode is None else {"method": {"type": "Exact"}, "decode": decode}
    return Engine(options, max_model_len=length, max_num_batched_tokens=8192, block_size=BLOCK)


def token_seconds(engine: Engine, prompt: list[int], num: int) -> tuple[float, float]:
    """Time a generated token, on the clock and of the processor; the prompt is in the cache, and is subtracted."""
    one, many = engine.ask(prompt, 1), engine.ask(prompt, 1 + num)
    return (many["seconds"] - one["seconds"]) / num, (many["cpu_seconds"] - one["cpu_seconds"]) / num


def retrieval(engines: dict[str, Engine], sample, questions: int) -> dict[str, dict]:
    """Ask all engines the same questions, spread over the second half of the document."""
    tokens, size = sample.tokens.tolist(), sample.answer_size
    late = [place for place in sample.answer_index if len(tokens) // 2 <= place <= len(tokens) - 2 * size]
    places = [late[number * len(late) // questions] for number in range(questions)]
    found = {name: {"digits": [], "answers": []} for name in engines}
    for place in places:
        for name, engine in engines.items():
            answer = engine.ask(tokens[: place - 1], 1 + size)
            right = [a == b for a, b in zip(answer["tokens"][1:], tokens[place : place + size], strict=True)]
            found[name]["digits"] += right
            found[name]["answers"].append(answer["tokens"])
            found[name] |= {key: answer["decoding"][key] for key in ("calls", "share_of_pairs")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--reads", nargs="+", default=["256:8", "1024:8", "1024:16"], help="budget:page")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    import vllm

    (sample,) = samples_of_documents(held_out_documents(asked.length, 1, seed=3))
    whole = sample.tokens[: asked.length - asked.tokens - 1].tolist()
    decodes: dict[str, dict | None] = {"stock": None}
    for each in asked.reads:
        budget, page = map(int, each.split(":"))
        decodes[f"budget {budget}, pages of {page}"] = {
            "budget": budget, "min_length": 4096, "policy": {"type": "TopPages", "page": page},
        }  # fmt: skip
    with ExitStack() as stack:
        engines = {name: stack.enter_context(engine_of(asked.length, each)) for name, each in decodes.items()}
        for engine in engines.values():
            engine.ask(whole, 1)
        found = retrieval(engines, sample, asked.questions)
        times = {name: [] for name in engines}
        for _ in range(asked.turns):
            for name, engine in engines.items():
                times[name].append(token_seconds(engine, whole, asked.tokens))
    for name in decodes:
        pairs = list(zip(times[name], times["stock"], strict=True))
        clock, cpu = (statistics.median(ours[i] / theirs[i] for ours, theirs in pairs) for i in range(2))
        digits, answers = found[name].pop("digits"), found[name].pop("answers")
        record = {
            "engine": name, "length": asked.length, "decode": decodes[name], "digits": len(digits), "right": sum(digits),
            "same_answers_as_stock": sum(a == b for a, b in zip(answers, found["stock"].get("kept", answers), strict=True)),
            "ms_per_token": [round(1000 * each[0], 2) for each in times[name]],
            "cpu_ms_per_token": [round(1000 * each[1], 2) for each in times[name]],
            "ratio_to_stock": round(clock, 3), "cpu_ratio_to_stock": round(cpu, 3),
            "turns": asked.turns, "tokens": asked.tokens,
            **found[name], "threads": os.environ.get("OMP_NUM_THREADS"), "load": os.getloadavg()[0],
            "machine": platform.machine(), "cores": os.cpu_count(),
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "hyperattention": __version__},
        }  # fmt: skip
        found[name]["kept"] = answers
        print(json.dumps(record))
        if asked.out:
            with asked.out.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
