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
