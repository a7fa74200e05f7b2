"""Score every key, and draw keys by the largest weight that a query of the tile gives them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.check import instance, positive
from hyperattention.select.density import Density, Distribution
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.mass import inverse, total_mass
from hyperattention.select.score.pooling import edges, pool_queries, seen_keys
from hyperattention.select.score.scan import Scan
from hyperattention.select.stage import CoveredKeys, LookAhead
from hyperattention.tiling import Tiles

# rounds in which listings above one are cut to one and the excess goes to the other keys
_CLIP_ROUNDS = 4
# numbers held per key while drawing
_NUMBERS = 12
# sums below this count as 0: division by them would overflow
_LEAST = 1e-30


@dataclass(frozen=True)
class _Listings(Distribution):
    """The expected number of listings of every key; rows sum to `num`."""

    expected: Float[Tensor, "lists chunk keys"]
    num: int

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Find the keys at evenly spaced points."""
        key, _ = inverse(self.expected, point)
        return key, self.expected.gather(2, key) / self.num

    def share(self, index: Tensor) -> Tensor:
        """Return the probabilities of keys; keys that the chunk does not see are never drawn."""
        last = self.expected.shape[2] - 1
        return (self.expected.gather(2, index.clamp(max=last)) / self.num).masked_fill(index > last, 0.0)


@dataclass(frozen=True)
class KeyScan(Density):
    """Draw keys by the largest attention share that a query of the tile gives them; every key is scored if they are few.

    p_j ~ min(1 / num, max_i exp(q_i . k_j - z_i));   a share of the draws is spread uniformly, so that no weight exceeds
    keys / (share * draws), even if the estimate is wrong.

    Heavy keys are scattered: one representative for sixteen keys misses half of their weight, and so does the average of
    four queries (docs/log.md). A product of 8-bit integers costs a quarter of a float32 product on a CPU, so keys are scored
    one by one here, by averages of a few neighbouring queries or by single queries. Each query is normalised before queries
    are combined, as in `HierarchicalSearch`. If a tile sees more than `most` keys, the density `beyond` draws for it, so
    that the cost stays near-linear.

    Source: Han et al., 2023 (arXiv:2310.05869), its idea; Hansen and Hurwitz, 1943, sampling in proportion to size; Madow,
    1949, evenly spaced points; Xiao et al., 2023 (arXiv:2211.10438), keys scaled channel by channel before rounding.
    Differs: estimates only determine the draws.
    Cost: pooled / tile * visible keys products per query, up to `most` keys, in 8-bit integers on a CPU with such
    instructions.
    Guarantee: numerator and denominator unbiased, for any estimate.

    Args:
        pooled: averaged queries per tile and head; equal to the tile size for no averaging.
        most: largest number of visible keys at which a tile scans them; a few thousand.
        beyond: density for tiles that see more keys.
        uniform_share: share of the draws that is spread uniformly.

    Raises:
        ValueError: if a count is not positive, or the share is not between 0 and 1.
        TypeError: if `beyond` is no `HierarchicalSearch`.
    """

    pooled: int = 32
    most: int = 8192
    beyond: HierarchicalSearch = field(default_factory=HierarchicalSearch)
    uniform_share: float = 0.2

    def __post_init__(self) -> None:
        positive("KeyScan", pooled=self.pooled, most=self.most)
        instance("KeyScan", HierarchicalSearch, "HierarchicalSearch()", beyond=self.beyond)
        if not 0.0 < self.uniform_share < 1.0:
            raise ValueError(f"KeyScan(uniform_share={self.uniform_share}): it must be between 0 and 1 to bound the weights")

    @property
    def looks_ahead(self) -> LookAhead:
        """Draws of a tile depend on all of its queries."""
        return LookAhead.TILE

    @property
    def evenly(self) -> bool:
        """Points are evenly spaced."""
        return True

    def seams(self, tiles: Tiles, num: int) -> list[int]:
        """Return the first tile that sees too many keys to scan, and the seams of the density that draws for it."""
        return [self._scanned(tiles), *self.beyond.seams(tiles, num)]

    def _scanned(self, tiles: Tiles) -> int:
        """Count the leading tiles that see no more keys than are scanned, by position alone."""
        if not tiles.problem.causal or tiles.problem.num_keys <= self.most:
            return len(tiles.index) if tiles.problem.num_keys <= self.most else 0
        return min(len(tiles.index), tiles.before(self.most // tiles.size))

    def numbers(self, tiles: Tiles) -> int:
        """Count a few numbers for every scanned key, or the numbers of the other density."""
        rows = tiles.problem.group * min(self.pooled, tiles.size)
        # on a GPU the scores of a chunk are computed at once; scores of blocks always are
        scores = rows / Scan.BLOCK if tiles.problem.device.type == "cpu" else rows
        scanned = ceil((_NUMBERS + scores) * min(self.most, tiles.problem.num_keys))
        return scanned if tiles.problem.num_keys <= self.most else max(scanned, self.beyond.numbers(tiles))

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool, num: int) -> float:
        """Count products of pooled queries with keys, block means and variances, per query."""
        few = min(num_keys, self.most)
        scanned = min(self.pooled, tile) / tile * (few / (2 if causal else 1)) * (1 + 2 / Scan.BLOCK)
        if num_keys <= self.most:
            return scanned
        beyond = self.beyond.selection_pairs(num_keys, tile, head_dim, causal, num)
        if not causal:
            return beyond
        # subtract the other density's products for the first tiles; they grow with the number of visible keys
        before = self.beyond.selection_pairs(few, tile, head_dim, causal, num)
        return (beyond * num_keys - before * few + scanned * few) / num_keys

    def prepare(self, tiles: Tiles, covered: CoveredKeys, num: int) -> Callable[[slice], Distribution]:
        """Round keys and pooled queries, and prepare the other density if a tile needs it."""
        problem, left = tiles.problem, edges(tiles, covered)
        scanned = self._scanned(tiles)
        beyond = self.beyond.prepare(tiles, covered, num) if scanned < len(tiles.index) else None
        if beyond is not None and not scanned:
            return beyond
        few = tiles.leading(scanned)
        # tiles with at most `num` remaining keys list all of them, so the first keys may serve as a sample of all keys
        scan = Scan.of(few, problem.k.flatten(0, 1)[:, : self.most], pool_queries(few, self.pooled, problem.scale), num)

        def law(part: slice) -> Distribution:
            if beyond is not None and part.stop > scanned:
                return beyond(part)
            some = tuple(x[:, part] for x in left)
            return self._law(
                scan.shares(part, seen_keys(tiles, part)), some, num, problem.causal and covered.gap is not None
            )

        return law

    def _law(self, share: Tensor, left: tuple[Tensor, ...], num: int, to_the_end: bool) -> _Listings:
        """Convert the largest shares of keys, in place, to expected listings; no remaining key may lie after the hole."""
        begin, hole_begin, hole_end, end = left
        key = torch.arange(share.shape[2], dtype=torch.int64, device=share.device)
        gone = (key < begin) | (key >= hole_begin)
        if not to_the_end:
            gone &= (key < hole_end) | (key >= end)
            gone |= key < begin
        mass = share.masked_fill_(gone, 0.0)
        count = (hole_begin - begin + end - hole_end).clamp(min=1)
        weighted = (1 - self.uniform_share) * num
        for _ in range(_CLIP_ROUNDS):
            torch.minimum(mass, total_mass(mass) / weighted, out=mass)
        total = total_mass(mass)
        # if no key was scored all draws are uniform
        even = torch.ones_like(total).masked_fill_(total > 0, self.uniform_share) * (num / count.to(total.dtype))
        mass.mul_(weighted / total.clamp(min=_LEAST)).add_(even).masked_fill_(gone, 0.0)
        # uniform draws are better spent on keys that are not listed for certain
        mass.clamp_(max=1.0)
        return _Listings(mass.mul_(num / total_mass(mass).clamp(min=_LEAST)), num)
