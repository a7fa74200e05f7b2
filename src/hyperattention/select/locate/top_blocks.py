"""The blocks of keys that matter most to a tile, found by a cheap score."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.check import positive
from hyperattention.select.score.blocks import BlockRank, KeyBounds, MeanKey
from hyperattention.select.stage import LookAhead, Stage, Taken
from hyperattention.tiling import Tiles
from hyperattention.types import Runs

# scores and gathered summaries of one chunk of tiles
SCORE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Coarse:
    """A first, coarser choice: only blocks inside the `num` best panels of `panel_size` keys are ranked at all.

    Panels are ranked by `KeyBounds`, in the projection of the finer score.

    Args:
        num: panels passed on for each tile.
        panel_size: keys in a panel, a multiple of the block size.

    Raises:
        ValueError: if a number is not positive.
    """

    num: int = 32
    panel_size: int = 128

    def __post_init__(self) -> None:
        positive("Coarse", num=self.num, panel_size=self.panel_size)


@dataclass(frozen=True)
class _Ranking:
    """What ranking needs, made once for all tiles."""

    pooled: Tensor  # [lists, tiles, pooled, width]
    summary: tuple[Tensor, ...]  # [lists, panels, ...]
    bounds: tuple[Tensor, ...]  # [lists, panels, 1, width]
    left: tuple[Tensor, Tensor, Tensor, Tensor]  # [lists, tiles, 1], what earlier stages left


@dataclass(frozen=True)
class TopBlocks(Stage):
    """Attend exactly to the `num` blocks of keys with the highest scores for each tile.

    Queries of a tile are averaged in `pooled` groups of neighbours a head, and a block counts with the best of its scores:
    what one query looks for is not averaged away by what the others do.

    Source: the block selections cited by the scores.   Differs: several pooled queries a tile, combined by their maximum.
    Cost: `num` * `block_size` slots a query, and the score's products.   Guarantee: exact on the pairs taken.

    Args:
        num: blocks taken for each tile.
        block_size: keys in a block.
        by: how blocks are ranked.
        pooled: averaged queries of each tile and head.
        coarse: a coarser choice made first, so that ranking costs less than all blocks; None ranks every block.

    Raises:
        ValueError: if a count is not positive, or panels are not whole blocks.
    """

    num: int
    block_size: int = 64
    by: BlockRank = field(default_factory=MeanKey)
    pooled: int = 4
    coarse: Coarse | None = None

    def __post_init__(self) -> None:
        positive("TopBlocks", num=self.num, block_size=self.block_size, pooled=self.pooled)
        if self.coarse is None:
            return
        if self.coarse.panel_size % self.block_size:
            raise ValueError(f"panels of {self.coarse.panel_size} keys are not whole blocks of {self.block_size}: use a multiple")
        if self.coarse.num * self.coarse.panel_size < self.num * self.block_size:
            raise ValueError(f"{self.coarse} passes on fewer keys than the {self.num} blocks of {self.block_size} to be taken")

    @property
    def looks_ahead(self) -> LookAhead:
        """A tile's blocks are chosen for all of its queries together."""
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
            products = KeyBounds().products(1) * visible / self.coarse.panel_size
            visible = min(visible, self.coarse.num * self.coarse.panel_size)
        products += self.by.products(self.block_size) * visible / self.block_size
        return self.pooled / tile * products * self.by.width(head_dim) / head_dim

    def select(self, tiles: Tiles, taken: Taken) -> tuple[tuple[Runs, ...], Taken]:
        """Score, rank and take blocks."""
        problem = tiles.problem
        if not problem.num_keys or not len(tiles.index):
            return (), taken
        begin, hole_begin, hole_end, end = (tiles.by_list(x) for x in taken.bounds(tiles))
        ranking = self._prepare(tiles, (begin, hole_begin, hole_end, end))
        block = torch.cat([self._choose(tiles, ranking, taken, part) for part in self._chunks(tiles)], 1)
        total = -(-problem.num_keys // self.block_size)
        runs = Runs(
            first=block * self.block_size,
            size=self.block_size,
            log_weight=torch.zeros(block.shape, device=block.device).masked_fill_(block == total, -torch.inf),
            low=begin,
            high=end,
            causal=problem.causal and taken.gap is None,
            hole=None if taken.gap is None else (hole_begin, hole_end),
            labelled=taken.labels is not None,
        )
        return (runs,), taken.with_blocks(block, self.block_size)

    def _prepare(self, tiles: Tiles, left: tuple[Tensor, Tensor, Tensor, Tensor]) -> _Ranking:
        k, q = tiles.problem.k.flatten(0, 1), self._pool(tiles)
        # until the budget binds every block is taken whatever its score: those keys may serve as a sample of the rest
        basis = self.by.basis(k[:, : self.num * self.block_size])
        if basis is not None:
            k, q = k @ basis, q @ basis[:, None]
        bounds = () if self.coarse is None else KeyBounds().summarise(k, self.coarse.panel_size, 1)
        edges = tuple(x[..., None] for x in left)
        return _Ranking(q, self.by.summarise(k, self.block_size, self._per_panel), bounds, edges)

    def _pool(self, tiles: Tiles) -> Tensor:
        """Average neighbouring queries of each head: ``[lists, tiles, pooled, head_dim]``."""
        problem = tiles.problem
        groups = min(self.pooled, tiles.size)
        size = -(-tiles.size // groups)
        spare = groups * size - tiles.size
        there = (problem.q.new_ones(1).expand(problem.q.shape[:3])).unsqueeze(3)
        sums = (
            pad(tiles.arrange(x).unflatten(2, (problem.group, tiles.size)), (0, 0, 0, spare))
            .unflatten(3, (groups, size))
            .sum(4)
            .flatten(2, 3)
            for x in (problem.q, there)
        )
        total, count = sums
        return total / count.clamp(min=1)

    def _chunks(self, tiles: Tiles) -> list[slice]:
        keys = tiles.problem.num_keys
        pooled, width = self.pooled * tiles.problem.group, 0
        if self.coarse is not None:
            keys = min(keys, self.coarse.num * self.coarse.panel_size)
            width = self.by.width(tiles.problem.k.shape[-1])
        lists = tiles.problem.k.shape[0] * tiles.problem.k.shape[1]
        step = max(1, SCORE_BYTES // max(1, 4 * lists * keys * (pooled + width)))
        return [slice(at, min(at + step, len(tiles.index))) for at in range(0, len(tiles.index), step)]

    def _choose(self, tiles: Tiles, ranking: _Ranking, taken: Taken, part: slice) -> Tensor:
        """Rank blocks for a chunk of tiles: numbers of the best, ascending; the number of blocks where too few are left."""
        problem, tile = tiles.problem, tiles.size
        query = ranking.pooled[:, part]
        left = tuple(x[:, part] for x in ranking.left)
        total = -(-problem.num_keys // self.block_size)
        device = query.device
        if self.coarse is None:
            score = self.by.score(query.flatten(1, 2), ranking.summary).unflatten(1, query.shape[1:3]).amax(2)
            block = torch.arange(score.shape[2], device=device).expand_as(score)
        else:
            # by position alone no tile of the chunk sees a key beyond this: known without waiting for the device
            seen = problem.num_keys
            if problem.causal:
                seen = min(seen, max(1, (problem.offset // tile + part.stop) * tile))
            panel = self._panels(query, ranking, left, -(-seen // self.coarse.panel_size))  # [lists, chunk, panels]
            # one row of the flattened panels for each list and panel chosen
            row = panel + torch.arange(len(panel), device=device)[:, None, None] * ranking.summary[0].shape[1]
            some = tuple(
                # whole panels as single rows: one copy each
                x.flatten(0, 1).flatten(1).index_select(0, row.flatten()).view(-1, panel.shape[2], *x.shape[2:])
                for x in ranking.summary
            )
            score = self.by.score(query.flatten(0, 1), some).amax(1).unflatten(0, panel.shape[:2])
            block = (panel[..., None] * self._per_panel + torch.arange(self._per_panel, device=device)).flatten(2)
        allowed = _any_left(block * self.block_size, self.block_size, left)
        for earlier, size in taken.blocks:
            allowed &= ~_overlap(block, self.block_size, earlier[:, part], size)
        num = min(self.num, score.shape[2])
        best, place = torch.nan_to_num(score, nan=0.0).masked_fill(~allowed, -torch.inf).topk(num, dim=-1)
        chosen = block.gather(2, place).masked_fill(best == -torch.inf, total).sort(-1)[0]
        return pad(chosen, (0, min(self.num, total) - num), value=total)

    def _panels(self, query: Tensor, ranking: _Ranking, left: tuple[Tensor, ...], seen: int) -> Tensor:
        """Choose among the first `seen` panels by the bounds on their scores, ascending."""
        coarse = self.coarse or Coarse()
        bounds = tuple(x[:, :seen] for x in ranking.bounds)
        score = KeyBounds().score(query.flatten(1, 2), bounds).unflatten(1, query.shape[1:3]).amax(2)
        first = torch.arange(score.shape[2], device=query.device) * coarse.panel_size
        score = torch.nan_to_num(score, nan=0.0).masked_fill(~_any_left(first, coarse.panel_size, left), -torch.inf)
        return score.topk(min(coarse.num, score.shape[2]), dim=-1)[1].sort(-1)[0]


def _any_left(first: Tensor, size: int, left: tuple[Tensor, ...]) -> Tensor:
    """Tell which runs of `size` keys hold a key that earlier stages left."""
    begin, hole_begin, hole_end, end = left
    until = first + size
    return (torch.minimum(until, hole_begin) > torch.maximum(first, begin)) | (
        torch.minimum(until, end) > torch.maximum(first, hole_end)
    )


def _overlap(block: Tensor, size: int, earlier: Tensor, earlier_size: int) -> Tensor:
    """Tell which blocks touch a block that an earlier stage chose; `earlier` ascends."""
    low = torch.searchsorted(earlier.contiguous(), block * size // earlier_size)
    high = torch.searchsorted(earlier.contiguous(), ((block + 1) * size - 1) // earlier_size, right=True)
    return high > low
