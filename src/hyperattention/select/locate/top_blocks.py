"""The top blocks of keys for each tile, by a cheap score."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.check import instance, positive
from hyperattention.select.score.blocks import BlockRank, KeyBounds, MeanKey
from hyperattention.select.score.pooling import Coarse, any_left, beyond, chunks, edges, pool_queries, seen_keys
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage
from hyperattention.tiling import Tiles
from hyperattention.types import Runs


@dataclass(frozen=True)
class _Ranking:
    """The data for ranking, computed once for all tiles."""

    pooled: Tensor  # [lists, tiles, pooled, width]
    summary: tuple[Tensor, ...]  # [lists, panels, ...]
    bounds: tuple[Tensor, ...]  # [lists, panels, 1, width]
    left: tuple[Tensor, Tensor, Tensor, Tensor]  # [lists, tiles, 1], edges of the remaining keys


@dataclass(frozen=True)
class TopBlocks(Stage):
    """Take the `num` blocks of keys with the highest scores for each tile.

    Queries of a tile are averaged in `pooled` groups of neighbours per head, and the score of a block is the maximum over
    these groups: a block that only one group needs is not averaged out by the other groups.

    Source: the block selections cited by the scores.   Differs: several pooled queries per tile, combined by their maximum.
    Cost: `num` * `block_size` slots per query, and the products of the score.   Guarantee: exact on the pairs taken.

    Args:
        num: number of blocks taken for each tile.
        block_size: number of keys in a block.
        by: ranking of the blocks.
        pooled: averaged queries per tile and head.
        coarse: a coarser choice made first, so that fewer blocks are ranked; None ranks every block.

    Raises:
        ValueError: if a count is not positive, or the panel size is not a multiple of the block size.
        TypeError: if `by` is no ranking of blocks, or `coarse` no `Coarse`.
    """

    num: int
    block_size: int = 64
    by: BlockRank = field(default_factory=MeanKey)
    pooled: int = 4
    coarse: Coarse | None = None

    def __post_init__(self) -> None:
        positive("TopBlocks", num=self.num, block_size=self.block_size, pooled=self.pooled)
        instance("TopBlocks", BlockRank, "MeanKey()", by=self.by)
        if self.coarse is None:
            return
        instance("TopBlocks", Coarse, "Coarse()", coarse=self.coarse)
        if self.coarse.panel_size % self.block_size:
            raise ValueError(
                f"panels of {self.coarse.panel_size} keys are not a multiple of block_size={self.block_size}: use a multiple"
            )
        if self.coarse.keys < self.num * self.block_size:
            raise ValueError(
                f"{self.coarse} passes on fewer keys than the {self.num} blocks of {self.block_size} to be taken: give it "
                "more panels, or take fewer blocks"
            )

    @property
    def looks_ahead(self) -> LookAhead:
        """The blocks of a tile are chosen for all of its queries together."""
        return LookAhead.TILE

    @property
    def _per_panel(self) -> int:
        return 1 if self.coarse is None else self.coarse.panel_size // self.block_size

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile."""
        return self.num * self.block_size

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count products of pooled queries and block summaries, per query."""
        visible, products = num_keys / (2 if causal else 1), 0.0
        if self.coarse is not None:
            products = self.coarse.products(visible)
            visible = min(visible, self.coarse.keys)
        products += self.by.products(self.block_size) * visible / self.block_size
        return self.pooled / tile * products * self.by.width(head_dim) / head_dim

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Score and rank blocks, and take the best."""
        problem = tiles.problem
        if not problem.k.shape[0] * problem.num_keys * len(tiles.index):
            return (), covered
        left = edges(tiles, covered)
        ranking = self._prepare(tiles, left)
        keys = problem.num_keys if self.coarse is None else min(problem.num_keys, self.coarse.keys)
        width = 0 if self.coarse is None else self.by.width(problem.k.shape[-1])
        parts = chunks(tiles, keys * (self.pooled * problem.group + width))
        block = torch.cat([self._choose(tiles, ranking, covered, part) for part in parts], 1)
        return (block_runs(tiles, covered, block, self.block_size),), covered.with_blocks(block, self.block_size)

    def _prepare(self, tiles: Tiles, left: tuple[Tensor, Tensor, Tensor, Tensor]) -> _Ranking:
        k, q = tiles.problem.k.flatten(0, 1), pool_queries(tiles, self.pooled)
        # tiles within the budget take every block at any score, so the first keys may serve as a sample of all keys
        basis = self.by.basis(k[:, : self.num * self.block_size])
        if basis is not None:
            k, q = k @ basis, q @ basis[:, None]
        bounds = () if self.coarse is None else KeyBounds().summarise(k, self.coarse.panel_size, 1)
        return _Ranking(q, self.by.summarise(k, self.block_size, self._per_panel), bounds, left)

    def _choose(self, tiles: Tiles, ranking: _Ranking, covered: CoveredKeys, part: slice) -> Tensor:
        """Rank blocks for a chunk of tiles: indices of the best, ascending, padded with the number of blocks if too few."""
        problem = tiles.problem
        query = ranking.pooled[:, part]
        left = tuple(x[:, part] for x in ranking.left)
        total = -(-problem.num_keys // self.block_size)
        device = query.device
        if self.coarse is None:
            score = self.by.score(query.flatten(1, 2), ranking.summary).unflatten(1, query.shape[1:3]).amax(2)
            block = torch.arange(score.shape[2], dtype=torch.int64, device=device).expand_as(score)
        else:
            panel = self._panels(query, ranking, left, seen_keys(tiles, part))  # [lists, chunk, panels]
            # one row of the flattened panels for each list and panel chosen
            row = (
                panel
                + torch.arange(len(panel), dtype=torch.int64, device=device)[:, None, None] * ranking.summary[0].shape[1]
            )
            some = tuple(
                # each panel is one row: one copy per panel
                x.flatten(0, 1).flatten(1).index_select(0, row.flatten()).view(-1, panel.shape[2], *x.shape[2:])
                for x in ranking.summary
            )
            score = self.by.score(query.flatten(0, 1), some).amax(1).unflatten(0, panel.shape[:2])
            block = (
                panel[..., None] * self._per_panel + torch.arange(self._per_panel, dtype=torch.int64, device=device)
            ).flatten(2)
        allowed = free_blocks(block, self.block_size, left, covered, part)
        num = min(self.num, score.shape[2])
        score = torch.nan_to_num(score, nan=0.0).masked_fill(~allowed, -torch.inf)
        if problem.causal:
            score = score.masked_fill(allowed & beyond(block * self.block_size, self.block_size, left), torch.inf)
        best, place = score.topk(num, dim=-1)
        chosen = block.gather(2, place).masked_fill(best == -torch.inf, total).sort(-1)[0]
        return pad(chosen, (0, min(self.num, total) - num), value=total)

    def _panels(self, query: Tensor, ranking: _Ranking, left: tuple[Tensor, ...], seen: int) -> Tensor:
        """Choose panels among those that hold the first `seen` keys, by the bounds on their scores."""
        coarse = self.coarse or Coarse()
        bounds = tuple(x[:, : -(-seen // coarse.panel_size)] for x in ranking.bounds)
        score = KeyBounds().score(query.flatten(1, 2), bounds).unflatten(1, query.shape[1:3]).amax(2)
        return coarse.choose(score, left)


def block_runs(tiles: Tiles, covered: CoveredKeys, block: Tensor, size: int) -> Runs:
    """List blocks as certain picks.

    Args:
        tiles: the tiled problem.
        covered: keys of earlier stages.
        block: indices of the blocks, ascending, ``[lists, tiles, slots]``; the number of all blocks marks an empty slot.
        size: keys in a block.

    Returns:
        the runs, which skip keys of earlier stages.
    """
    begin, hole_begin, hole_end, end = (x[..., 0] for x in edges(tiles, covered))
    empty = block == -(-tiles.problem.num_keys // size)
    return Runs(
        first=block * size,
        size=size,
        log_weight=torch.zeros(block.shape, dtype=torch.float32, device=block.device).masked_fill_(empty, -torch.inf),
        low=begin,
        high=end,
        causal=tiles.problem.causal and covered.gap is None,
        hole=None if covered.gap is None else (hole_begin, hole_end),
        labelled=covered.labels is not None,
    )


def free_blocks(block: Tensor, size: int, left: tuple[Tensor, ...], covered: CoveredKeys, part: slice) -> Tensor:
    """Return which blocks hold a remaining key, and overlap no block of an earlier stage.

    Args:
        block: indices of blocks, ``[lists, chunk, blocks]``.
        size: keys in a block.
        left: edges of the remaining keys of the chunk's tiles, from `edges`.
        covered: keys of earlier stages.
        part: the chunk of tiles.

    Returns:
        whether each block may be taken.
    """
    allowed = any_left(block * size, size, left)
    for earlier, earlier_size in covered.blocks:
        allowed &= ~_overlap(block, size, earlier[:, part], earlier_size)
    return allowed


def _overlap(block: Tensor, size: int, earlier: Tensor, earlier_size: int) -> Tensor:
    """Return which blocks overlap a block of an earlier stage; `earlier` is ascending."""
    low = torch.searchsorted(earlier.contiguous(), block * size // earlier_size)
    high = torch.searchsorted(earlier.contiguous(), ((block + 1) * size - 1) // earlier_size, right=True)
    return high > low
