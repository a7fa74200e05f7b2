"""The distribution over the leaves of a hierarchical search: keys of the blocks opened last, and closed blocks."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.select.density import Distribution
from hyperattention.select.score.mass import inverse, total_mass

# rounds in which a block's share is cut to one draw per key and the excess goes to the other blocks
CLIP_ROUNDS = 2
# sums below this count as 0: division by them would overflow
LEAST = 1e-30


@dataclass(frozen=True)
class Opened:
    """Keys of the blocks that were opened last.

    Args:
        first: index of each key.
        alive: whether earlier stages left the key.
    """

    first: Int[Tensor, "lists chunk keys"]
    alive: Bool[Tensor, "lists chunk keys"]


@dataclass(frozen=True)
class Closed:
    """Blocks of one size, with their estimated weights; some of them were opened.

    Args:
        first: first key of each block.
        size: number of keys in each block.
        mass: estimated weight of each block; undefined for blocks that are not alive.
        alive: whether the block is a leaf: without keys of earlier stages, and not opened.
    """

    first: Int[Tensor, "lists chunk blocks"]
    size: int
    mass: Float[Tensor, "lists chunk blocks"]
    alive: Bool[Tensor, "lists chunk blocks"]


@dataclass(frozen=True)
class Leaves(Distribution):
    """The expected number of listings of leaves; all keys of a leaf are listed equally often.

    Args:
        first: first key of each leaf.
        size: number of keys in each leaf.
        listings: expected listings of each leaf, summing to `num`; 0 for empty places.
        num: number of draws.
    """

    first: Int[Tensor, "lists chunk leaves"]
    size: Int[Tensor, " leaves"]
    listings: Float[Tensor, "lists chunk leaves"]
    num: int

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Find the leaf, then the key at the same fraction of the leaf."""
        leaf, inside = inverse(self.listings, point)
        size = self.size.expand(self.first.shape).gather(2, leaf)
        return self.first.gather(2, leaf) + (inside * size).long(), self.listings.gather(2, leaf) / (size * self.num)

    def share(self, index: Tensor) -> Tensor:
        """Find the leaf that holds each key: the last live leaf that begins at or before the key."""
        beyond = torch.iinfo(torch.int64).max
        first, order = self.first.masked_fill(self.listings == 0, beyond).sort(-1)
        at = (torch.searchsorted(first, index.contiguous(), right=True) - 1).clamp(min=0)
        leaf = order.gather(2, at)
        inside, size = index - self.first.gather(2, leaf), self.size[leaf]
        share = self.listings.gather(2, leaf) / (size * self.num)
        return share.masked_fill((inside < 0) | (inside >= size), 0.0)


def leaves_of(opened: Opened, closed: list[Closed], left: tuple[Tensor, ...], num: int, uniform_share: float) -> Leaves:
    """Return the expected listings of each leaf: opened keys once, closed blocks by weight with the remaining draws.

    Args:
        opened: keys listed for certain; if they are more than half of the draws, half of the draws are spread over them.
        closed: blocks from fine to coarse; live blocks and opened keys together hold every remaining key exactly once. The
            coarsest blocks, whose number depends on the visible keys, come last, where dead blocks do not change rounding.
        left: edges of the remaining keys, from `edges`.
        num: number of draws.
        uniform_share: share of the draws on closed blocks that is spread uniformly over their keys.

    Returns:
        the distribution.
    """
    begin, hole_begin, hole_end, end = left
    certain = opened.alive.sum(-1, keepdim=True, dtype=torch.float32)
    # keys in closed blocks; if there are none, opened keys share all draws
    count = hole_begin - begin + end - hole_end - certain
    share = num / certain.clamp(min=1)
    each = torch.where(count > 0, (0.5 * share).clamp(max=1.0), share)
    one, rest = opened.alive * each, num - each * certain
    first = torch.cat([opened.first, *(blocks.first for blocks in closed)], 2)
    size = torch.cat(
        [x.new_full(x.shape[2:], n) for x, n in ((opened.first, 1), *((blocks.first, blocks.size) for blocks in closed))]
    )
    if not closed:
        return Leaves(first, size, one, num)
    mass, alive = torch.cat([x.mass for x in closed], 2), torch.cat([x.alive for x in closed], 2)
    mass = torch.nan_to_num_(mass, nan=0.0, posinf=0.0).masked_fill_(~alive, 0.0)
    inside = size[one.shape[2] :]
    even, weighted = uniform_share * rest / count.clamp(min=1), (1 - uniform_share) * rest
    for _ in range(CLIP_ROUNDS):
        torch.minimum(mass, inside * (total_mass(mass) / weighted.clamp(min=LEAST)), out=mass)
    mass.mul_(weighted / total_mass(mass).clamp(min=LEAST)).add_(alive * (inside * even))
    mass.mul_(rest / total_mass(mass).clamp(min=LEAST))
    return Leaves(first, size, torch.cat([one, mass], 2), num)
