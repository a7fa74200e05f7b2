"""An engine of vLLM with the reference model in a process of its own, which a benchmark asks one question at a time.

Engines of several processes answer in turns, so that other programs on the machine slow all of them alike. Run as a program,
this file is the engine.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any, Self

from hyperattention.files.model_folder import WEIGHTS


class Engine:
    """An engine in a process of its own; leave it as a context to end the process."""

    def __init__(self, options: dict | None, **llm: Any) -> None:
        """Start it: with the plugin and its options, or stock for None; `llm` goes to vLLM."""
        environment = os.environ | {
            "HYPERATTENTION_VLLM_CPU": str(int(options is not None)), "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }  # fmt: skip
        llm |= {} if options is None else {"additional_config": {"hyperattention": options}}
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(llm)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1,
        )  # fmt: skip

    def __enter__(self) -> Self:
        """Return the engine."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def ask(self, prompt: list[int], max_tokens: int) -> dict:
        """Generate tokens; return them with the seconds, and what was counted since the engine began."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([prompt, max_tokens]) + "\n")
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the engine ended: {self._process.wait()}")


def _serve(llm: dict) -> None:
    """Answer one question a line."""
    from hyperattention.integrations.vllm.metrics import read_counts
    from vllm import LLM, SamplingParams

    engine = LLM(str(WEIGHTS), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=1, **llm)
    for line in sys.stdin:
        prompt, max_tokens = json.loads(line)
        asked = SamplingParams(temperature=0, detokenize=False, ignore_eos=True, max_tokens=max_tokens)
        began, spent = time.perf_counter(), time.process_time()
        (answer,) = engine.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
        found = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent}
        found |= {"tokens": list(answer.outputs[0].token_ids), "cached": answer.num_cached_tokens}
        counts = read_counts()
        for name, each in (("prompts", counts.prompts), ("decoding", counts.decoding)):
            found[name] = asdict(each) | {"share_of_pairs": each.share_of_pairs}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
