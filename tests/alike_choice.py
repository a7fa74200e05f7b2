"""A choice for alike queries by the kernels, of which every program keeps its memory: what each list was given."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.kernels.choose import alike_plan
from hyperattention.kernels.choose.alike_plan import AlikePlan
from hyperattention.select.alike import first_directions, sort_alike
from hyperattention.select.score.alike_fused import (
    FusedBlocks,
    FusedSort,
    fused_choice,
    fused_first,
    fused_plan,
)
from hyperattention.select.score.block_sizes import BlockSizes
from hyperattention.select.score.key_metric import KeyMetric
from hyperattention.select.score.pooling import edges_of
from hyperattention.select.stage import CoveredKeys
from hyperattention.tiling import Tiles


@dataclass(frozen=True)
class Chosen:
    """What a choice made.

    Args:
        ordered: the lists.
        blocks: blocks of keys.
        plan: how the choice was cut.
        index: the draws.
        query: averages, ``[lists, tiles, many, groups, width]``.
        spread: what they leave out, ``[lists, tiles, many, 2 * width]``.
        log_rows: half the logarithm of their rows, ``[lists, tiles, many, groups]``.
        bar: what their scores are compared with.
        share: shares of candidates, ``[lists, tiles, many, room]``.
        numbers: numbers of candidates, ``[lists, tiles, units]``; what stands behind them are others.
    """

    ordered: FusedSort
    blocks: FusedBlocks
    plan: AlikePlan
    index: Tensor
    query: Tensor
    spread: Tensor
    log_rows: Tensor
    bar: Tensor
    share: Tensor
    numbers: Tensor


def sorted_by_torch(tiles: Tiles, many: int) -> FusedSort:
    """Lists that PyTorch made, in place of a kernel that is slow to interpret; some directions of which all tell apart."""
    alike, begin = sort_alike(tiles, many)[0], first_directions(tiles.problem).to(tiles.problem.q.dtype)
    directions = torch.nn.functional.pad(begin, (0, 16 - begin.shape[1])).T
    return FusedSort(alike, alike.source, directions.expand(len(alike.source), len(tiles.index), -1, -1).contiguous())


def choose(
    monkeypatch, tiles: Tiles, many: int, groups: int, metric: KeyMetric | None = None, num: int = 24, most: int = 2**20,
    candidates: int = 2**20, covered: CoveredKeys | None = None,
) -> Chosen:  # fmt: skip
    """Choose keys."""
    # no program takes lists again
    monkeypatch.setattr(alike_plan, "_multiprocessors", lambda device: 2**20)
    problem, edges = tiles.problem, edges_of(tiles, covered or CoveredKeys()).of_tile
    k, v = (x.flatten(0, 1) for x in (problem.k, problem.v))
    centres, begin, noise, _ = fused_first(k, v, num, tiles, many)
    ordered = sorted_by_torch(tiles, many) if metric is None else FusedSort.of(tiles, many, metric, begin, edges)
    plan = fused_plan(tiles, BlockSizes(most), many, groups, candidates)
    blocks = FusedBlocks.of(k, v, centres, plan)
    shape = (len(k), len(tiles.index) * many)
    index, low, high = (torch.empty(x, dtype=torch.int64, device=k.device) for x in ((*shape, num), shape, shape))
    weight = torch.empty((*shape, num), device=k.device)
    memory = fused_choice(problem, ordered, edges, noise, blocks, (index, weight, low, high), plan, 0.1)
    assert plan.own(problem.q.shape[3]) == many
    # the last lists begin first, and rows of keys take turns
    by_row = (x.unflatten(0, (-1, len(memory[0]) // len(k), plan.together(len(k)))).transpose(1, 2) for x in memory)
    *of_units, numbers = (x.flatten(0, 1).flip(1) for x in by_row)
    return Chosen(ordered, blocks, plan, index, *(x[:, :, :many] for x in of_units), numbers)
