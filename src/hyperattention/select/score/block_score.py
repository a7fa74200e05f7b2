"""Draw keys by the scores of their blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.select.density import Density, Distribution, Uniform
from hyperattention.select.score.blocks import MeanKey
from hyperattention.select.score.mass import clipped, inverse, root_mean_square
from hyperattention.select.score.pooling import edges, pool_queries, seen_keys
from hyperattention.select.stage import CoveredKeys, LookAhead
from hyperattention.tiling import Tiles


@dataclass(frozen=True)
class _InBlocks(Distribution):
    """Probabilities of blocks, spread uniformly over the keys of each block."""

    mass: Tensor  # [lists, chunk, blocks], summing to one
    block_size: int

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Find the block, then the key at the same fraction of the block."""
        block, inside = inverse(self.mass, point)
        return block * self.block_size + (inside * self.block_size).long(), self.mass.gather(2, block) / self.block_size

    def share(self, index: Tensor) -> Tensor:
        """Return the probability of the block divided by its number of keys."""
        block = index // self.block_size
        last = self.mass.shape[2] - 1
        return (self.mass.gather(2, block.clamp(max=last)) / self.block_size).masked_fill(block > last, 0.0)


@dataclass(frozen=True)
class BlockScore(Density):
    """Draw keys in proportion to the estimated weight of their block: a coarse density over the entire sequence.

    a_iB = softmax_B(q_i . mean_{j in B} k_j),   p_j ~ (sum_i a_iB^2)^(1/2) / |B|
    Source: importance sampling; block means as in Jiang et al., 2024 (arXiv:2407.02490).   Differs: that work does not
    sample.
    Cost: `pooled` products per block and tile.   Guarantee: numerator and denominator unbiased, for any estimate.

    Args:
        block_size: number of keys in a block.
        pooled: averaged queries per tile and head.
        uniform_share: share of the draws that is uniform.

    Raises:
        ValueError: if a count is not positive, or the share is not between 0 and 1.
    """

    block_size: int = 64
    pooled: int = 1
    uniform_share: float = 0.3

    def __post_init__(self) -> None:
        positive("BlockScore", block_size=self.block_size, pooled=self.pooled)
        if not 0.0 < self.uniform_share < 1.0:
            raise ValueError(
                f"BlockScore(uniform_share={self.uniform_share}): it must be between 0 and 1 to bound the weights"
            )

    @property
    def looks_ahead(self) -> LookAhead:
        """Draws of a tile depend on all of its queries."""
        return LookAhead.TILE

    @property
    def components(self) -> tuple[tuple[Density, float], ...]:
        """The estimate, and uniform draws that reach every key."""
        return ((self, 1.0 - self.uniform_share), (Uniform(), self.uniform_share))

    @property
    def evenly(self) -> bool:
        """Points are evenly spaced."""
        return True

    def numbers(self, tiles: Tiles) -> int:
        """Count the scores and a few sums of each block."""
        return -(-tiles.problem.num_keys // self.block_size) * (self.pooled * tiles.problem.group + 6)

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool, num: int) -> float:
        """Count products of pooled queries with block means, per query."""
        return self.pooled / tile * num_keys / (2 if causal else 1) / self.block_size

    def prepare(self, tiles: Tiles, covered: CoveredKeys, num: int) -> Callable[[slice], Distribution]:
        """Average keys by block, and queries by tile."""
        problem, left = tiles.problem, edges(tiles, covered)
        k = problem.k.flatten(0, 1)
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        (mean,) = MeanKey().summarise(k, self.block_size, 1)
        mean = mean[:, :, 0].transpose(1, 2)
        query = pool_queries(tiles, self.pooled).to(k.dtype) * problem.scale

        def over(part: slice) -> Distribution:
            begin, hole_begin, hole_end, end = (x[:, part] for x in left)
            # only blocks without keys of earlier stages: uniform draws reach the other blocks
            blocks = max(1, seen_keys(tiles, part) // self.block_size)
            first = torch.arange(blocks, dtype=torch.int64, device=k.device) * self.block_size
            until = first + self.block_size
            whole = ((first >= begin) & (until <= hole_begin)) | ((first >= hole_end) & (until <= end))
            some = query[:, part]
            score = (some.flatten(1, 2) @ mean[:, :, :blocks]).unflatten(1, some.shape[1:3])
            mass = root_mean_square(score, whole)
            return _InBlocks(clipped(mass, num), self.block_size)

        return over
