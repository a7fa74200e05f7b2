"""Columns and diagonals of the attention matrix, chosen by the last queries."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.check import positive
from hyperattention.exact import grouped_scores
from hyperattention.select.locate.top_blocks import block_runs, free_blocks
from hyperattention.select.score.keys_left import key_runs, keys_left
from hyperattention.select.score.pooling import edges
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage
from hyperattention.tiling import Tiles
from hyperattention.types import Runs


@dataclass(frozen=True)
class VerticalSlash(Stage):
    """Take the columns and diagonals with the most weight for the last queries; all tiles share this choice.

    a_ij = softmax_j(q_i . k_j) over the last queries i,   column_j = sum_i a_ij,
    slash_b = sum of a_ij with (first key of i's tile) // tile - j // tile = b;   the heaviest are taken
    Source: Jiang et al., 2024 (arXiv:2407.02490), MInference, vertical-slash pattern.   Differs: a slash is a run of one
    tile's length at a multiple of it, where the paper's diagonals are one token wide and rounded to blocks afterwards; keys
    taken by earlier stages are not counted; the query heads of a group share their choice; the numbers of columns and
    diagonals are arguments, where the paper searches them for each head on a sample.
    Cost: `verticals` + tile * `slashes` slots per query, `last` rows of exact scores.   Guarantee: exact on the pairs taken.

    Args:
        verticals: number of keys taken for every tile.
        slashes: number of diagonals taken for every tile.
        last: number of last queries used for the estimate.

    Raises:
        ValueError: if a number is not positive.
    """

    verticals: int
    slashes: int
    last: int = 64

    def __post_init__(self) -> None:
        positive("VerticalSlash", verticals=self.verticals, slashes=self.slashes, last=self.last)

    @property
    def looks_ahead(self) -> LookAhead:
        """The last queries determine the keys of all rows."""
        return LookAhead.SEQUENCE

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile."""
        return self.verticals + self.slashes * tile

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count products of the last queries with all keys, spread over the queries."""
        return float(min(self.last, num_keys))

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Estimate the weight of columns and diagonals, and take the best."""
        problem = tiles.problem
        if not problem.k.shape[0] * problem.num_keys * len(tiles.index):
            return (), covered
        left = edges(tiles, covered)
        weight, origin = self._estimate(tiles, covered, left)
        distance = self._distances(weight, origin, tiles.size, problem.causal)
        total = -(-problem.num_keys // tiles.size)
        block = (tiles.by_list(tiles.start) // tiles.size)[..., None] - distance[:, None]
        outside = (block < 0) | (block >= total) | ~free_blocks(block, tiles.size, left, covered, slice(None))
        block = pad(block.masked_fill(outside, total).sort(-1)[0], (0, self.slashes - block.shape[2]), value=total)
        slashes, covered = block_runs(tiles, covered, block, tiles.size), covered.with_blocks(block, tiles.size)
        index = weight.sum(1).topk(min(self.verticals, problem.num_keys), dim=-1)[1].sort(-1)[0]
        index = pad(index, (0, self.verticals - index.shape[1]), value=problem.num_keys)
        index = index[:, None].expand(-1, len(tiles.index), -1).contiguous()
        verticals = key_runs(tiles, covered, index, torch.zeros(index.shape, dtype=torch.float32, device=index.device))
        return (slashes, verticals), covered.with_blocks(index, 1)

    def _estimate(self, tiles: Tiles, covered: CoveredKeys, left: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Weight keys by the last queries.

        Returns:
            weights summed over a group's heads, ``[lists, last, keys]``, 0 for keys already taken; and the block of each
            query's tile.
        """
        problem, count = tiles.problem, min(self.last, tiles.problem.num_queries)
        kv_heads, wide = problem.k.shape[1], torch.promote_types(problem.q.dtype, torch.float32)
        q = problem.q[:, :, -count:].to(wide).unflatten(1, (kv_heads, problem.group))
        place = (
            torch.arange(problem.num_queries - count, problem.num_queries, dtype=torch.int64, device=problem.device)
            + tiles.front
        )
        limit = tiles.by_list(tiles.limit).flatten(1)[:, place]  # [lists, last]
        score = grouped_scores(q, problem.k.to(wide), problem.scale).flatten(0, 1)  # [lists, group, last, keys]
        hidden = torch.arange(problem.num_keys, dtype=torch.int64, device=problem.device) >= limit[..., None]
        weight = torch.softmax(score.masked_fill_(hidden[:, None], -torch.inf), -1)
        first = (problem.num_queries - count + tiles.front) // tiles.size
        free = keys_left(tiles, covered, left, slice(first, len(tiles.index)))
        free = pad(free, (0, problem.num_keys - free.shape[2]))[:, place // tiles.size - first]
        # a row that is not finite gives no information
        weight = torch.nan_to_num_(weight, nan=0.0).sum(1).masked_fill_(~free, 0.0)
        return weight, (tiles.by_list(tiles.start) // tiles.size)[:, place // tiles.size]

    def _distances(self, weight: Tensor, origin: Tensor, size: int, causal: bool) -> Tensor:
        """Find the diagonals with the most weight: blocks between a tile and its run, ``[lists, slashes]``."""
        mass = pad(weight, (0, -weight.shape[2] % size)).unflatten(2, (-1, size)).sum(3)  # [lists, last, blocks]
        total = mass.shape[2]
        # a tile whose first key is not at a multiple of the tile size extends into one more block
        distance = torch.arange(-1 if causal else -total, total + 1, dtype=torch.int64, device=mass.device)
        block = origin[..., None] - distance
        inside = (block >= 0) & (block < total)
        along = mass.gather(2, block.clamp(0, total - 1)).masked_fill_(~inside, 0.0).sum(1)
        return distance[along.topk(min(self.slashes, along.shape[1]), dim=-1)[1]]
