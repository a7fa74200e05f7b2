"""The start of every choice: tiles, and the keys that leading stages take by their position alone.

On a GPU one launch computes all of it: see `kernels.choose.triton_place`.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from hyperattention.kernels.backend import grid_holds, triton_reads
from hyperattention.kernels.choose.operator_place import place_tiles
from hyperattention.kernels.choose.places import Places
from hyperattention.problem import Problem
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window
from hyperattention.select.stage import CoveredKeys, Edges, Stage
from hyperattention.tiling import Tiles, check_spans, cut
from hyperattention.types import Runs


@dataclass(frozen=True)
class Placed:
    """Tiles, and what is known before any key is read.

    Args:
        tiles: the tiles of positions.
        covered: keys that the leading stages took.
        runs: their slots.
        rest: the stages that follow.
        row_limit: for each row of a tile, how many leading keys it may see; 0 for a padding row.
        key_row: which row of the flattened keys each list reads.
    """

    tiles: Tiles
    covered: CoveredKeys
    runs: tuple[Runs, ...]
    rest: tuple[Stage, ...]
    row_limit: Int[Tensor, "lists tiles rows"]
    key_row: Int[Tensor, " lists"]


def placed(problem: Problem, stages: tuple[Stage, ...], size: int) -> Placed:
    """Cut queries into tiles, and run leading stages in the launch that does so, where one does.

    Args:
        problem: the problem.
        stages: all stages of a method, in order.
        size: positions in a tile.

    Returns:
        the tiles, and what leading stages took; nothing, with all stages still to run, where PyTorch cuts the tiles.
    """
    fits = problem.q.numel() and grid_holds(problem.k.shape[0] * problem.k.shape[1])
    if fits and triton_reads(problem.q, problem.k, problem.v):
        return _in_one_launch(problem, stages, size)
    tiles = cut(problem, size)
    limit = tiles.by_list(tiles.limit).repeat(1, 1, problem.group)
    lists = torch.arange(limit.shape[0], dtype=torch.int64, device=problem.device)
    return Placed(tiles, CoveredKeys(), (), stages, limit, lists)


def _in_one_launch(problem: Problem, stages: tuple[Stage, ...], size: int) -> Placed:
    """Do the same for sinks, then a window."""
    rest = stages
    sinks = rest[0] if rest and isinstance(rest[0], Sinks) else None
    rest = rest if sinks is None else rest[1:]
    window = rest[0] if rest and isinstance(rest[0], Window) else None
    rest = rest if window is None else rest[1:]
    places = _places(problem, size, 0 if sinks is None else sinks.num, window)
    table, edges, weight, limit, index, key_row = place_tiles(places, problem.q, problem.rank)
    zero, prefix_end, start, end, total, first, low, window_end, taken, visible_end = table
    each = slice(None, None, places.kv_heads)
    tiles = Tiles(problem, size, index, start[each], end[each], total[each, :1], limit[each, :, :size])
    covered, runs = CoveredKeys(), ()
    if sinks is not None:
        runs += (Runs(zero[..., None], sinks.num, weight, zero, prefix_end, problem.causal),)
        covered = CoveredKeys(prefix=sinks.num, placed=sinks.num)
    if window is not None:
        pieces = (first, places.before, start, False), (start, size + places.after, window_end, problem.causal)
        runs += tuple(Runs(begin[..., None], num, weight, low, high, causal) for begin, num, high, causal in pieces if num)
        gap = taken[each], window_end[each]
        covered = replace(covered, gap=gap, near=places.before, placed=covered.placed + window.slots(size))
    return Placed(tiles, replace(covered, edges=Edges(edges, prefix_end, visible_end)), runs, rest, limit, key_row)


def _places(problem: Problem, size: int, prefix: int, window: Window | None) -> Places:
    """Tell a kernel where tiles lie."""
    check_spans(problem, size)
    count, first, last = problem.num_queries, problem.offset // size, (problem.offset + problem.num_queries - 1) // size
    tiles = last + 1 - first if problem.spans is None else -(-count // size)
    length, step = (tiles, tiles) if problem.spans is None else (x // size for x in problem.spans)
    before = 0 if window is None else window.size if problem.causal else window.size // 2
    after = 0 if window is None or problem.causal else window.size - before
    return Places(
        problem.k.shape[0], problem.k.shape[1], problem.group, tiles, size, first, problem.offset % size, count,
        problem.num_keys, length, step, prefix, before, after, problem.causal, window is not None,
    )  # fmt: skip
