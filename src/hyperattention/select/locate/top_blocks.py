"""The blocks of keys that matter most to a tile, found by a cheap score."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.select.score.blocks import BlockRank, MeanKey
from hyperattention.select.stage import LookAhead, Stage, Taken
from hyperattention.tiling import Tiles
from hyperattention.types import Runs

# scores of one chunk of tiles
SCORE_BYTES = 16 * 2**20


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

    Raises:
        ValueError: if a count is not positive.
    """

    num: int
    block_size: int = 64
    by: BlockRank = field(default_factory=MeanKey)
    pooled: int = 4

    def __post_init__(self) -> None:
        positive("TopBlocks", num=self.num, block_size=self.block_size, pooled=self.pooled)

    @property
    def looks_ahead(self) -> LookAhead:
        """A tile's blocks are chosen for all of its queries together."""
        return LookAhead.TILE

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile."""
        return self.num * self.block_size

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count products of pooled queries and block summaries, per query."""
        blocks = num_keys / self.block_size / (2 if causal else 1)
        return self.pooled / tile * blocks * self.by.products(self.block_size, head_dim)

    def select(self, tiles: Tiles, taken: Taken) -> tuple[tuple[Runs, ...], Taken]:
        """Score, rank and take blocks."""
        problem = tiles.problem
        k = problem.k.flatten(0, 1)
        total = -(-problem.num_keys // self.block_size)
        begin, hole_begin, hole_end, end = taken.bounds(tiles)
        num = min(self.num, total)
        if not total or not len(tiles.index):
            return (), taken
        pooled = self._pool(tiles)
        # until the budget binds every block is taken, whatever its score: those keys may serve as a sample of the rest
        summary = self.by.summarise(k, self.block_size, self.num * self.block_size)
        chosen = [
            self._choose(pooled, summary, (tiles, taken), part, num) for part in self._chunks(tiles, k.shape[0], total)
        ]
        block, weight = (torch.cat(x, 1) for x in zip(*chosen, strict=True))
        low, high, hole = tiles.by_list(begin), tiles.by_list(end), (tiles.by_list(hole_begin), tiles.by_list(hole_end))
        runs = Runs(
            first=block * self.block_size,
            size=self.block_size,
            log_weight=weight,
            low=low,
            high=high,
            causal=problem.causal and taken.gap is None,
            hole=None if taken.gap is None else hole,
            labelled=taken.labels is not None,
        )
        return (runs,), taken.with_blocks(block, self.block_size)

    def _pool(self, tiles: Tiles) -> Tensor:
        """Average neighbouring queries of each head: ``[lists, tiles, pooled, head_dim]``."""
        problem = tiles.problem
        groups = min(self.pooled, tiles.size)
        size = -(-tiles.size // groups)
        ones = problem.q.new_ones((1, 1, problem.num_queries, 1)).expand(*problem.q.shape[:3], 1)
        q, there = (
            tiles.arrange(x).unflatten(2, (problem.group, tiles.size)) for x in (problem.q, ones)
        )  # [lists, tiles, group, tile, width]
        spare = groups * size - tiles.size
        q, there = (
            torch.nn.functional.pad(x, (0, 0, 0, spare)).unflatten(3, (groups, size)).sum(4).flatten(2, 3)
            for x in (q, there)
        )
        return q / there.clamp(min=1)

    def _chunks(self, tiles: Tiles, lists: int, blocks: int) -> list[slice]:
        keys = blocks * self.block_size
        step = max(1, SCORE_BYTES // max(1, 4 * lists * keys * self.pooled * tiles.problem.group))
        return [slice(at, at + step) for at in range(0, len(tiles.index), step)]

    def _choose(
        self, pooled: Tensor, summary: tuple[Tensor, ...], context: tuple[Tiles, Taken], part: slice, num: int
    ) -> tuple[Tensor, Tensor]:
        """Rank the blocks for a chunk of tiles: their numbers, ascending, and their log-weights."""
        tiles, taken = context
        problem = tiles.problem
        total = -(-problem.num_keys // self.block_size)
        query = pooled[:, part]
        # by position alone no tile of the chunk sees keys beyond this: known without waiting for the device
        last = min(len(tiles.index), part.stop) - 1
        seen = (problem.offset // tiles.size + last + 1) * tiles.size if problem.causal else problem.num_keys
        blocks = max(num, min(total, -(-seen // self.block_size)))
        score = self.by.score(query.flatten(1, 2), summary, blocks)
        score = score.unflatten(1, query.shape[1:3]).amax(2)  # [lists, chunk, blocks]
        score = torch.nan_to_num(score, nan=0.0)
        begin, hole_begin, hole_end, end = (tiles.by_list(x[:, part])[..., None] for x in taken.bounds(tiles))
        at = torch.arange(blocks, device=score.device) * self.block_size
        until = at + self.block_size
        left = (torch.minimum(until, hole_begin) > torch.maximum(at, begin)) | (
            torch.minimum(until, end) > torch.maximum(at, hole_end)
        )
        for earlier, size in taken.blocks:
            edge = torch.stack([earlier[:, part] * size, (earlier[:, part] + 1) * size - 1])
            member = torch.zeros_like(left.expand_as(score))
            for where in edge.clamp(max=blocks * self.block_size - 1) // self.block_size:
                member = member.scatter(2, where, True)
            left = left & ~member
        score = torch.where(left, score, -torch.inf)
        best, block = score.topk(num, dim=-1)
        block = torch.where(best == -torch.inf, total, block).sort(-1)[0]
        return block, torch.zeros_like(best).masked_fill(block == total, -torch.inf).float()
