"""List heavy keys, found by opening smaller and smaller blocks of large weight, and draw the others by estimated weight."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.kernels.backend import grid_holds, triton_reads
from hyperattention.kernels.choose.operator import MOST_ROWS
from hyperattention.select.density import Density, Distribution
from hyperattention.select.score.blocks import KeySketch
from hyperattention.select.score.level import Level, first_level, opened_at
from hyperattention.select.score.pooling import chunks, edges, edges_of, pool_queries
from hyperattention.select.score.precision import for_estimates
from hyperattention.select.score.representatives import Representatives
from hyperattention.select.score.scratch import Scratch
from hyperattention.select.score.search_fused import FusedSearch, noise_of, prepared
from hyperattention.select.score.walk import BATCH_NUMBERS, Walk
from hyperattention.select.stage import CoveredKeys, LookAhead
from hyperattention.tiling import Tiles

# number of blocks whose keys are squared at once
_BLOCKS = 32


@dataclass(frozen=True)
class HierarchicalSearch(Density):
    """Draw keys by the largest weight that a query of the tile would give them, estimated from coarse blocks to fine ones.

    p_B ~ sum_r n_r max_i exp(U q_i . U k_r - z_i) over the representatives r of block B, of n_r keys each; the blocks with
    the largest p_B are opened, level by level; U = principal directions of the first keys.

    Every query is normalised by z_i before queries are combined, so that queries with sharp and with diffuse attention both
    count. z_i estimates the query's log-sum-exp as if the scores in each of the coarsest blocks were normal; it is at least
    the largest score of the level, and at most that plus the log of the number of visible keys. Keys of the blocks opened
    last are listed for certain; from closed blocks, keys are drawn by the estimated weight. A share of those draws is spread
    uniformly over the keys of closed blocks, so that no weight exceeds keys / (share * draws), even if the estimate is
    wrong. Points are evenly spaced from one random offset per tile.

    The blocks opened last take at most half of the draws. If there are few draws, fewer blocks are opened, but at least
    four, so that blocks cut by an edge of the window or the sequence are always opened; if four blocks are too many, their
    keys are drawn and not certain. The blocks of the last level should be small compared with the number of draws.

    Source: Han et al., 2023 (arXiv:2310.05869), its idea; Hansen and Hurwitz, 1943, sampling in proportion to size; Madow,
    1949, evenly spaced points; Singhania et al., 2024 (arXiv:2406.02542), keys in their principal directions.
    Differs: a tree in place of hashing, and one distribution over its leaves.
    Cost: pooled queries times scored representatives, in short products; only the first level's number grows with the
    length.
    Guarantee: numerator and denominator unbiased, for any estimate.

    Args:
        levels: levels from coarse to fine; each block size divides the previous one. If the blocks of the last level have
            one key, keys are scored one by one, and the best are listed for certain.
        dim: number of principal directions; with `head_dim` or more, keys are not projected.
        pooled: averaged queries per tile and head.
        uniform_share: share of the draws on closed blocks that is spread uniformly.

    Raises:
        ValueError: if a count is not positive, there is no level, a block size does not divide the previous one, or the
            share is not between 0 and 1.
    """

    levels: tuple[Level, ...] = field(
        default_factory=lambda: (
            Level(4096, 32, Representatives(4, 8)),
            Level(256, 24, Representatives(2, 4)),
            Level(16, 8, Representatives(1, 3)),
        )
    )
    dim: int = 64
    pooled: int = 16
    uniform_share: float = 0.2

    def __post_init__(self) -> None:
        positive("HierarchicalSearch", dim=self.dim, pooled=self.pooled)
        if not self.levels or not all(isinstance(level, Level) for level in self.levels):
            raise ValueError(f"HierarchicalSearch(levels={self.levels!r}): give a tuple of at least one Level")
        for above, below in pairwise(self.levels):
            if above.block_size % below.block_size or above.block_size == below.block_size:
                raise ValueError(
                    f"blocks of {above.block_size} keys cannot be cut into several of {below.block_size}: use a divisor"
                )
        if not 0.0 < self.uniform_share < 1.0:
            raise ValueError(
                f"HierarchicalSearch(uniform_share={self.uniform_share}): it must be between 0 and 1 to bound the weights"
            )

    @property
    def looks_ahead(self) -> LookAhead:
        """Draws of a tile depend on all of its queries."""
        return LookAhead.TILE

    @property
    def evenly(self) -> bool:
        """Points are evenly spaced."""
        return True

    def seams(self, tiles: Tiles, num: int) -> list[int]:
        """Return for each level the first tile that sees more blocks than are opened: from there on blocks are scored."""
        if not tiles.problem.causal:
            return []
        begins = zip(self.levels[: max(1, len(self.levels) - 1)], opened_at(self.levels, num), strict=False)
        free = [keep * level.block_size // tiles.size for level, keep in begins]
        return [tiles.before(first) for first in free]

    def numbers(self, tiles: Tiles) -> int:
        """Count the numbers held for the leaves: first keys, weights and temporary values."""
        levels = self.levels[first_level(self.levels, tiles.problem.num_keys, tiles.problem.num_keys) :]
        sizes = [level.block_size for level in levels[1:]] + [1]
        opened = sum(level.keep * level.block_size // size for level, size in zip(levels, sizes, strict=True))
        return 8 * (tiles.problem.num_keys // levels[0].block_size + opened)

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool, num: int) -> float:
        """Count products of pooled queries with representatives, means and variances, per query."""
        visible = num_keys / (2 if causal else 1)
        return self.pooled / tile * sum(self._columns(visible, num)) * min(self.dim, head_dim) / head_dim

    def _columns(self, visible: int | float, num: int) -> list[float]:
        """Count the vectors that are multiplied with a pooled query for each tile: moments, then each level."""
        begin = first_level(self.levels, num, visible)
        levels, keep = self.levels[begin:], opened_at(self.levels, num)[begin:]
        columns = [2 * visible / levels[0].block_size]
        if visible > keep[0] * levels[0].block_size:
            columns.append(visible / levels[0].block_size * levels[0].by.num)
        for (above, level), most in zip(pairwise(levels), keep, strict=False):
            visible = min(visible, most * above.block_size)
            columns.append(visible / level.block_size * level.by.num)
        return columns

    def prepare(self, tiles: Tiles, covered: CoveredKeys, num: int) -> Callable[[slice], Distribution]:
        """Project keys and pooled queries, and choose the representatives of every block."""
        if self._fused(tiles):
            return self._search(tiles, covered, num).law
        k = tiles.problem.k.flatten(0, 1)
        levels, room = self._levels(num, k.shape[1])
        # tiles with at most `num` remaining keys list all of them, so the first keys may serve as a sample of all keys
        head = k[:, :num].to(torch.promote_types(k.dtype, torch.float32))
        # scores of centred keys differ by a constant per query, and have smaller rounding errors
        middle, basis = head.mean(1, keepdim=True), None
        if self.dim < k.shape[2]:
            basis = KeySketch(self.dim).basis(head)
        keys, query = _prepare(tiles, k, middle, basis, room, self.pooled)
        summaries = _summaries(keys, levels)
        rough = tuple(for_estimates(x) for x in summaries)
        scratch = (Scratch(like, BATCH_NUMBERS) for like in (rough[0], rough[0], keys))
        left, moments = edges(tiles, covered), tuple(for_estimates(x) for x in _moments(keys, levels, summaries))
        share, query = self.uniform_share, for_estimates(query)
        return Walk(levels, tiles, left, covered.near, query, rough, moments, num, share, *scratch).law

    def write(self, tiles: Tiles, covered: CoveredKeys, num: int, results: tuple[Tensor, Tensor]) -> bool:
        """Draw in kernels, where they support the call."""
        if not self._fused(tiles):
            return False
        search, noise = self._search(tiles, covered, num), noise_of(tiles, 0)
        # masses, which leaves there are, and the first keys of parts: half of what PyTorch holds
        for part in chunks(tiles, self.numbers(tiles) // 2, self.seams(tiles, num)):
            search.law(part).write(noise[:, part], (results[0][:, part], results[1][:, part]))
        return True

    def _fused(self, tiles: Tiles) -> bool:
        """Return whether kernels search."""
        problem = tiles.problem
        fits = problem.group * min(self.pooled, tiles.size) <= MOST_ROWS
        return fits and grid_holds(problem.k.shape[0] * problem.k.shape[1]) and triton_reads(problem.q, problem.k)

    def _levels(self, num: int, num_keys: int) -> tuple[tuple[Level, ...], int]:
        """Return the levels of a call, and the keys in whole blocks."""
        levels = self.levels[first_level(self.levels, num, num_keys) :]
        # pad the last block, and add one block, which fills places if fewer blocks remain than may be opened
        return levels, (-(-num_keys // levels[0].block_size) + 1) * levels[0].block_size

    def _search(self, tiles: Tiles, covered: CoveredKeys, num: int) -> FusedSearch:
        """Prepare the search in kernels."""
        k = tiles.problem.k.flatten(0, 1)
        levels, room = self._levels(num, k.shape[1])
        keys, query = prepared(tiles, k, num, self.dim, room, self.pooled)
        of_tile = edges_of(tiles, covered).of_tile
        return FusedSearch(levels, tiles, of_tile, covered.near, query, keys, num, self.uniform_share)


def _prepare(tiles: Tiles, k: Tensor, middle: Tensor, basis: Tensor | None, room: int, pooled: int) -> tuple[Tensor, Tensor]:
    """Centre and project keys, ``[lists, room, width]``, pool and project queries, ``[lists, tiles, rows, width]``."""
    query = pool_queries(tiles, pooled, tiles.problem.scale)
    keys = query.new_empty(k.shape[0], room, k.shape[2] if basis is None else basis.shape[2])
    if basis is None:
        keys[:, : k.shape[1]].copy_(k).sub_(middle)
    else:
        keys[:, : k.shape[1]] = torch.baddbmm(middle @ basis, k.to(keys.dtype), basis, beta=-1)
        query = (query.flatten(1, 2) @ basis).unflatten(1, query.shape[1:3])
    keys[:, k.shape[1] :] = 0.0
    # a key or query that is not finite gives no information: only the uniform share covers it
    keys, query = (torch.nan_to_num_(x, posinf=0.0, neginf=0.0) for x in (keys, query))
    return keys, query


def _moments(keys: Tensor, levels: tuple[Level, ...], summaries: list[Tensor]) -> list[Tensor]:
    """Average keys and squares for each possible first level, ``[lists, blocks, 2 * width]``: means, then variances."""
    begins = levels[: max(1, len(levels) - 1)]
    mean = summaries[len(begins) - 1][:, :, : begins[-1].by.means].mean(2)
    few = _BLOCKS if keys.device.type == "cpu" else keys.shape[1]
    # a few blocks at a time, for little memory; a norm over a middle axis would take eight times as long
    square = [some.square().sum(2) for some in keys.unflatten(1, (-1, begins[-1].block_size)).split(few, 1)]
    square, moments = torch.cat(square, 1) / begins[-1].block_size, []
    for above, level in zip([None, *begins[:-1]][::-1], begins[::-1], strict=True):
        moments.insert(0, torch.cat([mean, (square - mean.square()).clamp_(min=0)], 2))
        if above is not None:
            mean, square = (x.unflatten(1, (-1, above.block_size // level.block_size)).mean(2) for x in (mean, square))
    return moments


def _summaries(keys: Tensor, levels: tuple[Level, ...]) -> list[Tensor]:
    """Choose the representatives of each level's blocks; far keys of a coarse block come from those of its parts."""
    summaries, below = [], None
    for level in reversed(levels):
        among = None
        if below is not None and below.by.far:
            among = summaries[0][:, :, below.by.means :]
            among = among.unflatten(1, (-1, level.block_size // below.block_size)).flatten(2, 3)
        enough = among is not None and among.shape[2] >= level.by.far
        chosen = level.by.choose(keys.unflatten(1, (-1, level.block_size)), among if enough else None)
        summaries, below = [chosen, *summaries], level
    return summaries
