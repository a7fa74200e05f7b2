"""Measure exact attention as the package runs it beside torch's own, on a CPU or a GPU: one query, a chunk, a square.

    python benchmarks/exact_paths.py                        # where there is a GPU, there; else on the CPU
    python benchmarks/exact_paths.py --threads 1
    python benchmarks/exact_paths.py --toy --out /tmp/toy.jsonl

Calls run in turn, and ratios are those of medians. The baseline of a chunk is torch's attention without a mask, which scores
as many pairs and a few more; beside it stands what torch offers for a chunk, causal_lower_right. Where the default
method is not exact, `method=None` is left out. A ratio above 1 means that torch is faster.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from claims import announce
from gpu.timing import seconds_of
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from hyperattention import Exact, attention, default_method, measured_attention
from hyperattention.bench.timing import Ratio, Timing, speedup
from hyperattention.files.records import write_records

OUT = Path(__file__).parent / "records"
BASE, CHUNK = "torch", "torch, causal_lower_right"


@dataclass(frozen=True)
class Shape:
    """One call: queries at the end of the keys, heads on kv heads."""

    queries: int
    keys: int
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64

    @property
    def square(self) -> bool:
        return self.queries == self.keys

    @property
    def title(self) -> str:
        return f"{self.queries:,} of {self.keys:,}, batch {self.batch}, {self.heads} heads on {self.kv_heads}"

    def tensors(self, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        sizes = ((self.heads, self.queries), (self.kv_heads, self.keys), (self.kv_heads, self.keys))
        shapes = [(self.batch, heads, tokens, self.head_dim) for heads, tokens in sizes]
        return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]


CPU = tuple(
    Shape(queries, keys, kv_heads=kv_heads)
    for kv_heads in (8, 2)
    for queries, keys in ((1, 32_768), (16, 32_768), (1024, 32_768), (2048, 2048), (4096, 4096))
)
GPU = tuple(
    Shape(queries, keys, batch, 32, 8, 128)
    for queries, keys, batch in ((1, 131_072, 1), (1, 131_072, 8), (2048, 131_072, 1), (4096, 4096, 1), (8192, 8192, 1))
)
TOY = (Shape(1, 256), Shape(16, 256, kv_heads=2), Shape(128, 128))


def calls_of(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    q, k, v = shape.tensors(device, dtype)
    grouped = shape.heads != shape.kv_heads
    options = {"is_causal": True, "causal_align": "lower_right", "enable_gqa": grouped}
    calls = {BASE: lambda: scaled_dot_product_attention(q, k, v, is_causal=shape.square, enable_gqa=grouped)}
    if not shape.square and shape.queries > 1:
        bias = causal_lower_right(shape.queries, shape.keys)
        calls[CHUNK] = lambda: scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped)
    calls["Exact()"] = lambda: attention(q, k, v, method=Exact(), **options)
    calls["Exact(), with lse"] = lambda: measured_attention(q, k, v, method=Exact(), **options).out
    mask = torch.arange(shape.keys, device=device).expand(shape.batch, -1) >= shape.keys // 64
    calls["Exact(), padded by 1/64"] = lambda: attention(q, k, v, method=Exact(), key_mask=mask, **options)
    if default_method(shape.keys, num_queries=shape.queries, device=device) == Exact():
        calls["method=None"] = lambda: attention(q, k, v, **options)
    return calls


def measure(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    announce(shape.title)
    calls = calls_of(shape, device, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    names, where = list(calls), torch.device(device)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(seconds_of(calls[name], where))
    timings = {name: Timing(tuple(spent)) for name, spent in seconds.items()}
    records = []
    for name, timing in timings.items():
        # how many times slower than torch: the quartiles are those of the rounds
        slower: Ratio = speedup(timing, timings[BASE])
        records.append(
            {"part": "call", "shape": shape, "title": shape.title, "call": name, "median_s": timing.median,
             "quartiles_s": timing.quartiles, "slower": slower, "rounds": rounds, "dtype": str(dtype)}
        )  # fmt: skip
        print(f"      {name:28} {1000 * timing.median:9.3f} ms {slower.value:6.2f} ({slower.low:.2f} to {slower.high:.2f})")
    return records


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = OUT / f"exact_paths_{'gpu' if on_gpu else 'cpu'}.jsonl"
    parser.add_argument("--out", type=Path, default=default, help="file of the records")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--toy", action="store_true", help="tiny inputs, to see that the script runs")
    args = parser.parse_args()
    if args.toy and args.out == default:
        parser.error("--toy measures nothing worth committing: name another file with --out")
    torch.set_num_threads(args.threads)
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    shapes = TOY if args.toy else (GPU if on_gpu else CPU)
    with torch.inference_mode():
        records = [each for shape in shapes for each in measure(shape, device, dtype, args.rounds)]
    where = {"card": torch.cuda.get_device_name()} if on_gpu else {}
    write_records(args.out, [record | where for record in records], kind="exact_paths")


if __name__ == "__main__":
    main()
