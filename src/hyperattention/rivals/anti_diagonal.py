"""Rank blocks of keys by sums of their scores with a tile along anti-diagonals."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.check import positive
from hyperattention.select.locate.top_blocks import block_runs, free_blocks
from hyperattention.select.score.pooling import beyond, chunks, edges, seen_keys
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage
from hyperattention.tiling import Tiles
from hyperattention.types import Runs


@dataclass(frozen=True)
class _Groups:
    """Runs of `stride` tokens, concatenated so that one product sums an anti-diagonal."""

    query: Tensor  # [lists, tiles, groups, stride * head_dim], the queries of each in reverse
    key: Tensor  # [lists, groups, stride * head_dim]
    limit: Tensor  # [lists, tiles, groups], keys that the last query of each sees


@dataclass(frozen=True)
class AntiDiagonal(Stage):
    """Take for each tile the `num` blocks with the most weight, by scores summed along anti-diagonals.

    a_gh = softmax_h(1 / S * sum_{t < S} q_{gS + S-1-t} . k_{hS + t}),   score_B = sum_{g in tile, h in B} a_gh
    Every query and every key of a block enters one sum of each group. Anti-diagonals cross a column or a diagonal of large
    scores, which averages of queries and keys would hide.
    Source: Xu et al., 2025 (arXiv:2503.16428), XAttention, S the stride.   Differs: a fixed number of blocks per tile, so
    that budgets can be compared, where the paper keeps the fewest blocks that hold a given share of the weight; the query
    heads of a group share their blocks; blocks are cut by rank of live keys.
    Cost: `num` * `block_size` slots per query, 1 / `stride` of exact attention's products: quadratic in the length.
    Guarantee: exact on the pairs taken.

    Args:
        num: number of blocks taken for each tile.
        block_size: number of keys in a block.
        stride: number of tokens in a sum.

    Raises:
        ValueError: if a size is not positive, or `block_size` is not a multiple of `stride`.
    """

    num: int
    block_size: int = 64
    stride: int = 8

    def __post_init__(self) -> None:
        positive("AntiDiagonal", num=self.num, block_size=self.block_size, stride=self.stride)
        if self.block_size % self.stride:
            raise ValueError(
                f"AntiDiagonal(block_size={self.block_size}, stride={self.stride}): block_size must be a multiple of "
                "stride; use a divisor of block_size"
            )

    @property
    def looks_ahead(self) -> LookAhead:
        """The blocks of a tile are chosen for all of its queries together."""
        return LookAhead.TILE

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile."""
        return self.num * self.block_size

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count products of groups of queries and keys, per query: `stride` for every `stride` keys and queries."""
        return num_keys / (2 if causal else 1) / self.stride

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Sum the scores, rank blocks and take the best."""
        problem = tiles.problem
        if not problem.k.shape[0] * problem.num_keys * len(tiles.index):
            return (), covered
        groups, left = self._groups(tiles), edges(tiles, covered)
        parts = chunks(tiles, 2 * groups.key.shape[1] * groups.query.shape[2])
        block = torch.cat([self._choose(tiles, groups, covered, left, part) for part in parts], 1)
        return (block_runs(tiles, covered, block, self.block_size),), covered.with_blocks(block, self.block_size)

    def _groups(self, tiles: Tiles) -> _Groups:
        problem, stride = tiles.problem, self.stride
        wide = torch.promote_types(problem.k.dtype, torch.float32)
        spare = -tiles.size % stride
        query = pad(tiles.split(problem.q).to(wide), (0, 0, 0, spare)) * (problem.scale / stride)
        query = query.unflatten(3, (-1, stride)).flip(4).flatten(4, 5).flatten(2, 3)
        key = pad(problem.k.flatten(0, 1).to(wide), (0, 0, 0, -problem.num_keys % stride))
        limit = pad(tiles.limit, (0, spare)).unflatten(2, (-1, stride)).amax(-1)
        return _Groups(query, key.unflatten(1, (-1, stride)).flatten(2, 3), tiles.by_list(limit).repeat(1, 1, problem.group))

    def _choose(self, tiles: Tiles, groups: _Groups, covered: CoveredKeys, left: tuple[Tensor, ...], part: slice) -> Tensor:
        """Rank blocks for a chunk of tiles: indices of the best, ascending, padded with the number of blocks if too few."""
        problem, left = tiles.problem, tuple(x[:, part] for x in left)
        total = -(-problem.num_keys // self.block_size)
        query, key = groups.query[:, part], groups.key[:, : -(-seen_keys(tiles, part) // self.stride)]
        score = (query.flatten(1, 2) @ key.transpose(1, 2)).unflatten(1, query.shape[1:3])
        first = torch.arange(key.shape[1], dtype=torch.int64, device=key.device) * self.stride
        # a sum that extends beyond the tile would look ahead
        hidden = (first >= groups.limit[:, part, :, None]) | (first + self.stride > left[3][:, :, None])
        weight = torch.softmax(score.masked_fill_(hidden, -torch.inf), -1)
        weight = torch.nan_to_num_(weight, nan=0.0).sum(2)
        per_block = self.block_size // self.stride
        mass = pad(weight, (0, total * per_block - weight.shape[2])).unflatten(2, (total, per_block)).sum(3)
        block = torch.arange(total, dtype=torch.int64, device=key.device).expand_as(mass)
        allowed = free_blocks(block, self.block_size, left, covered, part)
        mass = mass.masked_fill(~allowed, -torch.inf)
        if problem.causal:
            mass = mass.masked_fill(allowed & beyond(block * self.block_size, self.block_size, left), torch.inf)
        best, chosen = mass.topk(min(self.num, total), dim=-1)
        return chosen.masked_fill(best == -torch.inf, total).sort(-1)[0]
