"""Measure the feature kernel in PyTorch on a CPU beside matrix products of the same size, one thread.

    python benchmarks/feature_kernel.py                                # about 3 minutes of one core
    python benchmarks/feature_kernel.py --toy --out /tmp/toy.jsonl     # seconds

Counted are the products of a call: what each key adds to the state, what each row reads from it, and, if causal, the
pairs of each block of 64 or 128 rows, products and weighted values. Two baselines do as many in the same round: the same
products alone, of the same sizes, on operands that lie ready, queries and keys as rows (`same products`, forward or
backward); and, for the forward pass, products of square matrices of 512 (`square`). Ratios are medians of ratios within a
round. Times are of the thread's processor, because others may share the machine; what they do to its caches is in both.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hyperattention.bench.timing import Timing, speedup
from hyperattention.files.records import write_records
from hyperattention.kernels.feature import plan, reference
from hyperattention.kernels.feature.powers import POWERS

OUT = Path(__file__).parent / "records" / "feature_kernel.jsonl"
SQUARE = 512


@dataclass(frozen=True)
class Case:
    """One call with as many queries as keys."""

    keys: int
    power: int
    features: int
    value_dim: int = 64
    causal: bool = True
    heads: int = 2

    @property
    def expanded(self) -> int:
        return POWERS[self.power].expanded(self.features)

    @property
    def limit(self) -> Tensor:
        every = torch.full((1, self.keys), self.keys)
        return torch.arange(1, self.keys + 1)[None] if self.causal else every

    @property
    def flops(self) -> int:
        """Operations of the products of a forward pass, two for each multiplication."""
        return sum(2 * x.blocks * x.rows * x.inner * x.columns for x in products(self, backward=False)) * steps(self)


@dataclass(frozen=True)
class Product:
    """Matrix products of the blocks of a step."""

    blocks: int
    rows: int
    inner: int
    columns: int
    # whether the second factor lies transposed
    transposed: bool = False


KINDS = ((1, 64, 64), (1, 128, 128), (1, 256, 64), (2, 32, 64))
CASES = (
    *(Case(keys, *kind) for keys in (2048, 8192, 32_768) for kind in KINDS),
    *(Case(8192, *kind, causal=False) for kind in KINDS),
)
TOY = (Case(1024, 1, 16), Case(1024, 2, 8), Case(1024, 1, 16, causal=False))


def passes(case: Case) -> dict[str, Callable[[], object]]:
    """The forward pass, and the backward pass."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.rand(1, case.heads, case.keys, case.features, generator=generator) for _ in range(2))
    value = torch.randn(1, case.heads, case.keys, case.value_dim, generator=generator)
    scale, limit = torch.zeros(1, case.heads, case.keys), case.limit
    out, lse = reference.forward(query, key, value, scale, scale, limit, case.power)
    saved = query, key, value, scale, scale, out, lse
    return {
        "forward": lambda: reference.forward(query, key, value, scale, scale, limit, case.power),
        "backward": lambda: reference.backward((out, lse), saved, limit, case.power),
    }


def step_rows(case: Case) -> int:
    return min(plan.plan_of(case.limit[0], case.expanded).step_rows, case.keys)


def steps(case: Case) -> int:
    return case.heads * case.keys // step_rows(case)


def products(case: Case, *, backward: bool) -> list[Product]:
    """The products of a step."""
    at_once, size = step_rows(case), plan.block_keys(case.expanded)
    size = size if case.causal else at_once
    blocks, wide, width, features = at_once // size, case.expanded, case.value_dim + 1, case.features
    weight, weighted = Product(blocks, size, features, size, True), Product(blocks, size, size, width)
    slopes, sloped = Product(blocks, size, width, size, True), Product(blocks, size, size, features)
    add, read, pull = (
        Product(blocks, wide, size, width),
        Product(blocks, size, wide, width),
        Product(blocks, size, width, wide),
    )
    if not backward:
        return [add, read, *([weight, weighted] if case.causal else ())]
    pairs = [slopes, sloped, *([weight] if case.power > 1 else ()), slopes, sloped, weight, weighted]
    return [add, pull, add, pull, read, *(pairs if case.causal else ())]


def same_products(case: Case, *, backward: bool) -> Callable[[], object]:
    """The products of a pass, step by step, on operands that lie ready."""
    pairs = []
    for x in products(case, backward=backward):
        shape = (x.columns, x.inner) if x.transposed else (x.inner, x.columns)
        second = torch.randn(x.blocks, *shape)
        pairs.append((torch.randn(x.blocks, x.rows, x.inner), second.transpose(1, 2) if x.transposed else second))

    def run() -> None:
        for _ in range(steps(case)):
            for one, other in pairs:
                torch.bmm(one, other)

    return run


def square(case: Case) -> Callable[[], object]:
    """As many operations in products of square matrices."""
    one, other = torch.randn(2, SQUARE, SQUARE)

    def run() -> None:
        for _ in range(max(1, round(case.flops / (2 * SQUARE**3)))):
            torch.mm(one, other)

    return run


def measure(case: Case, rounds: int) -> Iterator[dict[str, object]]:
    """Time every call of a case in turn."""
    names = {"forward": "same products", "backward": "same products, backward"}
    alone = {names[each]: same_products(case, backward=each == "backward") for each in names}
    calls = {**alone, "square": square(case), **passes(case)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            begun = time.thread_time()
            # inside an operator there is nothing to record either
            with torch.inference_mode():
                call()
            # the first round warms up
            if number:
                seconds[name].append(time.thread_time() - begun)
    timings = {name: Timing(tuple(times)) for name, times in seconds.items()}
    for name, same in names.items():
        yield {
            "part": name,
            "case": asdict(case),
            "expanded": case.expanded,
            "products_gflop": case.flops / 1e9,
            "rounds": rounds,
            "median_s": {each: timings[each].median for each in (name, same, "square")},
            "to_same_products": speedup(timings[name], timings[same]),
            "to_square": speedup(timings[name], timings["square"]),
        }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="short sequences, 2 rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records = []
    for case in TOY if given.toy else CASES:
        for record in measure(case, 2 if given.toy else given.rounds):
            records.append(record)
            ratios = (record[f"to_{name}"] for name in ("same_products", "square"))
            print(case.keys, case.power, case.features, case.causal, record["part"], record["median_s"], *ratios, flush=True)
    write_records(given.out, records, kind="feature_kernel")


if __name__ == "__main__":
    main()
