"""A program that starts engines of vLLM, one after another, and prints what they answer as JSON on its last line.

Tests run it in a process of their own: whether the plugin replaces the CPU's attention is decided once in a process.
"""

import gc
import json
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING"
)
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# lets a function be sent to the workers
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"


def run(case: dict) -> dict:
    """Start one engine and ask it."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from hyperattention.integrations.vllm.metrics import read_counts
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, "disable_log_stats": False}
    before, graphs = read_counts(), graphs_seen()
    try:
        with cut_into_pieces() if case.get("pieces") else nullcontext():
            llm = LLM(case["model"], **(options | case.get("llm", {})))
    except Exception as error:
        cleanup_dist_env_and_memory()
        return {"error": f"{type(error).__name__}: {error}"}
    asked = SamplingParams(temperature=0, detokenize=False, ignore_eos=True, **case.get("sampling", {}))
    answers, seconds, computed, started = [], [], [], graphs_seen()
    # batches one after another: later ones find the prefixes of earlier ones
    for batch in case["batches"]:
        began, spent = time.perf_counter(), time.process_time()
        answers += llm.generate([{"prompt_token_ids": each} for each in batch], asked, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        computed.append(time.process_time() - spent)
    # each process of a group counts its own heads' calls
    ranks = llm.collective_rpc(worker_counts) if case["llm"].get("tensor_parallel_size", 1) > 1 else []
    after, metrics = read_counts(), {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    prompts = approximated_between(before.prompts, after.prompts)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {
        "tokens": [list(a.outputs[0].token_ids) for a in answers],
        "logprobs": [[next(iter(p.values())).logprob for p in a.outputs[0].logprobs or ()] for a in answers],
        "prompt": [_prompt(a, case) for a in answers],
        "cached": [a.num_cached_tokens for a in answers],
        "preemptions": metrics.get("vllm:num_preemptions"),
        "seconds": seconds,
        "cpu_seconds": computed,
        "approximated": prompts["calls"],
        "exact": {reason: num - before.exact.get(reason, 0) for reason, num in after.exact.items()},
        "listed_pairs": prompts["listed_pairs"],
        "exact_pairs": prompts["exact_pairs"],
        "ranks": ranks,
        "audits": prompts["audits"],
        "error": prompts["error"],
        "decoding": approximated_between(before.decoding, after.decoding),
        "compiled": {name: num - graphs[name] for name, num in started.items()},
        "compiled_later": {name: num - started[name] for name, num in graphs_seen().items()},
    }


def graphs_seen() -> dict[str, int]:
    """Count what this process compiled: graphs of a model, their pieces with and without attention, and breaks."""
    from torch._dynamo.utils import counters
    from vllm.compilation.counter import compilation_counter as counted

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "pieces": counted.num_piecewise_graphs_seen,
        "compiled pieces": counted.num_piecewise_capturable_graphs_seen,
    }


def cut_into_pieces() -> AbstractContextManager:
    """Let vLLM cut a model's graph at attention, as it does on a GPU: on a CPU it sets another mode, whatever is asked."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def keep(config: Any) -> None:
        update(config)
        compilation = config.compilation_config
        # the other settings belong to a GPU: passes with its operators, and sizes of its graphs
        compilation.mode, compilation.backend, compilation.compile_sizes = CompilationMode.VLLM_COMPILE, "eager", []
        compilation.pass_config.fuse_norm_quant = compilation.pass_config.fuse_act_quant = False

    return mock.patch.object(CpuPlatform, "check_and_update_config", staticmethod(keep))


def approximated_between(before, after) -> dict:
    """Count what an engine approximated: of prompts, or of requests that generate."""
    audits = after.audits - before.audits
    error = after.error * after.audits - (before.error * before.audits if before.audits else 0.0) if audits else 0.0
    return {
        "calls": after.calls - before.calls,
        "listed_pairs": after.listed_pairs - before.listed_pairs,
        "exact_pairs": after.exact_pairs - before.exact_pairs,
        "audits": audits,
        "error": error / audits if audits else None,
    }


def worker_counts(_worker) -> list[float]:
    """Read the counts of a worker, from inside."""
    from hyperattention.integrations.vllm.metrics import read_counts

    counts = read_counts()
    return [counts.prompts.calls, counts.prompts.listed_pairs, counts.prompts.exact_pairs, counts.decoding.calls]


def _prompt(answer, case: dict) -> list:
    """The log-probability of every token of the prompt but the first, and the likeliest token before it."""
    given = answer.prompt_logprobs
    if given is None:
        return []
    tokens = answer.prompt_token_ids
    return [[p[t].logprob, min(p, key=lambda each: p[each].rank)] for p, t in zip(given[1:], tokens[1:], strict=True)]


if __name__ == "__main__":
    results = [run(case) for case in json.load(sys.stdin)]
    print("\n" + json.dumps(results), flush=True)
    # engines end in any order, some of them slowly
    os._exit(0)
