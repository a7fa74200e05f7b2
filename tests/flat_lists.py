"""Selections of every kind that the fast list kernel reads: weighted ranges, drawn keys, blocks with holes, causal runs."""

from dataclasses import replace

import torch

from hyperattention.types import Runs, Selection
from random_lists import LISTS, TILES, integers, make_runs

# keys in the runs that are read as ranges
LONG = 70, 90


def make_flat_selection(
    *, seed: int = 0, keys: int = 200, rows: int = 18, causal: bool = True, ranges: int = 2
) -> Selection:
    """Two long runs that may overlap no key of one another, one of them weighted, and shorter ones; no labels, no gaps."""
    generator = torch.Generator().manual_seed(seed)
    hole = integers(generator, 3, 6, LISTS, TILES)
    runs = [
        make_runs(generator, 4, 5, keys, causal=causal),
        make_runs(generator, 1, 70, keys),
        make_runs(generator, 3, 9, keys, hole=(hole, hole + 2)),
        make_runs(generator, 1, 7, keys, causal=causal),
    ]
    for size, tested in list(zip(LONG, (causal, False), strict=True))[:ranges]:
        runs.insert(1, make_long_run(generator, size, keys, causal=tested))
    limit = integers(generator, 0, keys + 1, LISTS, TILES, rows)
    return Selection(tuple(runs), row_limit=limit, key_row=torch.tensor([1, 0]))


def make_long_run(generator: torch.Generator, size: int, keys: int, *, causal: bool) -> Runs:
    run = make_runs(generator, size, 1, keys, causal=causal)
    low, length = integers(generator, 0, keys // 2, LISTS, TILES), integers(generator, 0, size + 9, LISTS, TILES)
    first = low[..., None] - integers(generator, 0, 5, LISTS, TILES, 1)
    return replace(run, first=first, low=low, high=torch.minimum(low + length, torch.tensor(keys)))


def whole_runs(generator: torch.Generator, size: int, slots: int, keys: int) -> Runs:
    """Runs of which every key counts, in every tile but the last, and their weights."""
    run = make_runs(generator, size, slots, keys)
    first = integers(generator, 0, keys - size + 1, LISTS, TILES, slots)
    return replace(
        run, first=first, log_weight=torch.rand(first.shape, generator=generator), low=run.low * 0, high=run.low * 0 + keys
    )


def make_lying_selections(*, seed: int = 0, keys: int = 200, rows: int = 18) -> dict[str, Selection]:
    """What is read as it lies, by name: one group of any kind, or ranges with no more than a short run beside them."""
    generator = torch.Generator().manual_seed(seed)
    hole = integers(generator, 30, 60, LISTS, TILES)
    few = whole_runs(generator, 1, 150, keys)
    slot, number = torch.arange(150), integers(generator, 0, 151, LISTS, TILES, 1)
    number[0, 0], number[-1, -1] = 0, 64
    long = [make_long_run(generator, size, keys, causal=tested) for size, tested in zip(LONG, (False, True), strict=True)]
    sinks = make_runs(generator, 16, 1, keys, causal=True)
    groups = {
        "drawn": [whole_runs(generator, 1, 150, keys)],
        "few drawn": [replace(few, log_weight=few.log_weight.masked_fill(slot >= number, -torch.inf))],
        "fewer than a block": [whole_runs(generator, 1, 20, keys)],
        "some slots empty": [make_runs(generator, 1, 150, keys)],
        "blocks": [whole_runs(generator, 5, 30, keys)],
        "blocks around a hole": [make_runs(generator, 5, 30, keys, hole=(hole, hole + 40))],
        "causal, short": [make_runs(generator, 4, 9, keys, causal=True)],
        "one run": [make_runs(generator, 40, 1, keys)],
        "range": long[:1],
        "causal range": long[1:],
        "window": long,
        "sinks, window": [sinks, *long],
        "sinks that all rows see, range": [replace(sinks, causal=False), *long[:1]],
        "drawn beside a causal range": [long[1], whole_runs(generator, 1, 100, keys)],
    }
    limit, key_row = integers(generator, 0, keys + 1, LISTS, TILES, rows), torch.tensor([1, 0])
    return {name: Selection(tuple(runs), row_limit=limit, key_row=key_row) for name, runs in groups.items()}
