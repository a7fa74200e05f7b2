"""Time to the first token at long prompts: vLLM with the plugin beside vLLM without, in turns on one machine.

    make test-vllm PYTEST_ARGS=--collect-only      # makes .venv-vllm
    .venv-vllm/bin/python benchmarks/vllm_ttft.py --out benchmarks/records/vllm_ttft.jsonl

Each engine runs in a process of its own, with the reference model. A record holds the times of one length and engine, and
what was approximated. Beside the time on the clock it has the time of the processor, of all threads together: other programs
on the machine prolong the first, and hardly the second.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "vllm"))
from engines import PROGRAM
from hyperattention import __version__
from hyperattention.files.model_folder import WEIGHTS
from hyperattention.reference.text import held_out_text


def ask(length: int, chunk: int, repeats: int, options: dict | None) -> dict:
    """Start an engine, and time prompts of one length to their first token; the first prompt warms up."""
    text = held_out_text()
    prompts = [list(text[i * 1000 : i * 1000 + length - 1]) for i in range(repeats)]
    llm = {"max_model_len": length, "max_num_batched_tokens": chunk, "max_num_seqs": 1, "enable_prefix_caching": False}
    if options is not None:
        llm["additional_config"] = {"hyperattention": options}
    case = {"model": str(WEIGHTS), "sampling": {"max_tokens": 1}, "llm": llm}
    case["batches"] = [[prompts[0][:2048]], *([each] for each in prompts)]
    environment = os.environ | {"HYPERATTENTION_VLLM_CPU": str(int(options is not None))}
    done = subprocess.run(
        [sys.executable, PROGRAM], input=json.dumps([case]), capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    (result,) = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768])
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["lean", "default"])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    engines = {"stock": None} | {name: {"method": name, "audit_every": 0} for name in asked.methods}
    import vllm

    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "hyperattention": __version__}
    with asked.out.open("a") as out:
        for length in asked.lengths:
            for turn in range(asked.turns):
                for name, options in engines.items():
                    load = os.getloadavg()[0]
                    found = ask(length, asked.chunk, asked.repeats, options)
                    record = {
                        "engine": name, "length": length, "chunk": asked.chunk, "turn": turn,
                        "seconds": [round(each, 3) for each in found["seconds"][1:]],
                        "cpu_seconds": [round(each, 3) for each in found["cpu_seconds"][1:]],
                        "approximated": found["approximated"],
                        "share_of_pairs": round(found["listed_pairs"] / found["exact_pairs"], 4) if options else 1.0,
                        "threads": os.environ.get("OMP_NUM_THREADS"), "load_before": load,
                        "machine": platform.machine(), "cores": os.cpu_count(), "versions": versions,
                    }  # fmt: skip
                    out.write(json.dumps(record) + "\n")
                    out.flush()
                    print(json.dumps(record))


if __name__ == "__main__":
    main()
