"""Measure the feature kernel in PyTorch on a CPU beside matrix products of the same size, causal, one thread.

    python benchmarks/feature_kernel.py                                # about 2 minutes of one core
    python benchmarks/feature_kernel.py --toy --out /tmp/toy.jsonl     # seconds

Counted are the products of a call: what each key adds to the state, what each row reads from it, and the pairs of each block
of 64 or 128 rows, products and weighted values. Three baselines do as many: the same products alone, of the same sizes, on
operands that lie ready, queries and keys as rows (`same products`); these products as the kernel does them, with queries
upright and values padded (`kernel's products`), which is the faster order; and products of square matrices of 512
(`square`). Calls run in turn, and ratios are medians of ratios within a round. Times are of the thread's processor, because
others may share the machine. A backward pass has about three times as many products as a forward pass; its baselines are
those of the forward pass.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hyperattention.bench.timing import Timing, speedup
from hyperattention.files.records import write_records
from hyperattention.kernels.feature import plan, reference
from hyperattention.kernels.feature.columns import MULTIPLE
from hyperattention.kernels.feature.powers import POWERS

OUT = Path(__file__).parent / "records" / "feature_kernel.jsonl"
SQUARE = 512


@dataclass(frozen=True)
class Case:
    """One causal call with as many queries as keys."""

    keys: int
    power: int
    features: int
    heads: int = 2
    value_dim: int = 64

    @property
    def rows(self) -> int:
        return self.keys * self.heads

    @property
    def expanded(self) -> int:
        return POWERS[self.power].expanded(self.features)

    @property
    def flops(self) -> int:
        """Operations of the products of a forward pass, two for each multiplication."""
        state = 2 * self.expanded * (self.value_dim + 1)
        pairs = plan.block_keys(self.expanded) * (self.features + self.value_dim + 1)
        return 2 * self.rows * (state + pairs)


CASES = tuple(Case(keys, *kind) for keys in (16_384, 65_536) for kind in ((1, 64), (2, 32)))
TOY = (Case(1024, 1, 16, heads=1), Case(1024, 2, 8, heads=1))


def passes(case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    """The forward pass, and the backward pass."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.rand(1, case.heads, case.keys, case.features, generator=generator) for _ in range(2))
    value = torch.randn(1, case.heads, case.keys, case.value_dim, generator=generator)
    scales = [torch.zeros(1, case.heads, case.keys)] * 2
    arguments = query, key, value, *scales
    limit = torch.arange(1, case.keys + 1)[None]
    out, lse = reference.forward(*arguments, limit, case.power)
    yield "forward", lambda: reference.forward(*arguments, limit, case.power)
    yield "backward", lambda: reference.backward((out, lse), (*arguments, out, lse), limit, case.power)


def blocks_of(case: Case) -> tuple[int, int]:
    """Keys of a block, and blocks of a step."""
    size = plan.block_keys(case.expanded)
    step_rows = plan.plan_of(torch.arange(1, case.keys + 1), case.expanded).step_rows
    return size, min(step_rows, case.keys) // size


def same_products(case: Case) -> Callable[[], object]:
    """The products of a forward pass, step by step, on operands that lie ready."""
    (size, blocks), width = blocks_of(case), case.value_dim + 1
    query, key = (torch.randn(blocks, size, case.features) for _ in range(2))
    value, more = torch.randn(blocks, size, width), torch.randn(blocks, case.expanded, size)
    rows = torch.randn(blocks, size, case.expanded)

    def run() -> None:
        for _ in range(-(-case.rows // (blocks * size))):
            weight = torch.bmm(query, key.transpose(1, 2))
            state = torch.bmm(more, value)
            torch.bmm(rows, state)
            torch.bmm(weight, value)

    return run


def kernel_products(case: Case) -> Callable[[], object]:
    """The same products with upright queries, the sums of a row in one place, and values as wide as the kernel's."""
    (size, blocks), padded = blocks_of(case), -(-(case.value_dim + 1) // MULTIPLE) * MULTIPLE
    query, key = torch.randn(blocks, case.features, size), torch.randn(blocks, size, case.features)
    value, more = torch.randn(blocks, size, padded), torch.randn(blocks, case.expanded, size)
    rows = torch.randn(blocks, case.expanded, size).transpose(1, 2)

    def run() -> None:
        for _ in range(-(-case.rows // (blocks * size))):
            weight = torch.bmm(key, query)
            total = torch.bmm(rows, torch.bmm(more, value))
            total.baddbmm_(weight.transpose(1, 2), value)

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
    baselines = {"same products": same_products(case), "kernel's products": kernel_products(case), "square": square(case)}
    calls = {**baselines, **dict(passes(case))}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            begun = time.thread_time()
            call()
            # the first round warms up
            if number:
                seconds[name].append(time.thread_time() - begun)
    timings = {name: Timing(tuple(times)) for name, times in seconds.items()}
    for name in ("forward", "backward"):
        yield {
            "part": name,
            "case": asdict(case),
            "expanded": case.expanded,
            "products_gflop": case.flops / 1e9,
            "rounds": rounds,
            "median_s": {each: timings[each].median for each in (name, *baselines)},
            "to_same_products": speedup(timings[name], timings["same products"]),
            "to_kernel_products": speedup(timings[name], timings["kernel's products"]),
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
            ratios = (record[f"to_{name}"] for name in ("same_products", "kernel_products", "square"))
            print(case.keys, case.power, record["part"], record["median_s"], *ratios)
    write_records(given.out, records, kind="feature_kernel")


if __name__ == "__main__":
    main()
