"""The law of a descent's leaves: blocks that stayed closed, and single keys of those that were opened."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.select.draw import Distribution
from hyperattention.select.score.mass import inverse

# rounds in which probabilities above one draw's share are cut to it and the rest is given to the others
_CLIP_ROUNDS = 4


@dataclass(frozen=True)
class Candidates:
    """Blocks of one size, or keys, with their estimated weights.

    Args:
        first: first key of each.
        size: keys in each.
        mass: estimated weight of each; anything where it is not alive.
        alive: whether it is a leaf: left whole by earlier stages, and not opened.
    """

    first: Int[Tensor, "lists chunk leaves"]
    size: int
    mass: Float[Tensor, "lists chunk leaves"]
    alive: Bool[Tensor, "lists chunk leaves"]


@dataclass(frozen=True)
class Leaves(Distribution):
    """Probabilities of leaves, spread evenly over the keys of each.

    Args:
        first: first key of each leaf.
        size: keys in each leaf.
        mass: probability of each leaf, summing to one; 0 where there is none.
    """

    first: Int[Tensor, "lists chunk leaves"]
    size: Int[Tensor, " leaves"]
    mass: Float[Tensor, "lists chunk leaves"]

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Find the leaf, then the key at the same share of the way through it; ascending, as memory is read fastest."""
        leaf, inside = inverse(self.mass, point)
        size = self.size[leaf]
        index, order = (self.first.gather(2, leaf) + (inside * size).long()).sort(-1)
        return index, (self.mass.gather(2, leaf) / size).gather(2, order)

    def share(self, index: Tensor) -> Tensor:
        """Look up the leaf that holds each key: the last of those alive that begins at or before it."""
        beyond = torch.iinfo(torch.int64).max
        first, order = self.first.masked_fill(self.mass == 0, beyond).sort(-1)
        at = (torch.searchsorted(first, index.contiguous(), right=True) - 1).clamp(min=0)
        leaf = order.gather(2, at)
        inside, size = index - self.first.gather(2, leaf), self.size[leaf]
        return (self.mass.gather(2, leaf) / size).masked_fill((inside < 0) | (inside >= size), 0.0)


def leaves_of(groups: list[Candidates], left: tuple[Tensor, ...], num: int, uniform_share: float) -> Leaves:
    """Turn estimated weights into probabilities: of no key much above one draw's, of no leaf below its even share.

    A key whose weight would list it more than once is listed once, for certain, and the others share what that frees.

    Args:
        groups: keys, then blocks from fine to coarse; those alive hold every key that is left exactly once. The coarsest,
            whose number depends on how much is seen, come last, where dead ones change no sum by a bit.
        left: what earlier stages left, from `edges`.
        num: draws.
        uniform_share: share of the probability that is spread evenly over the keys.

    Returns:
        the law.
    """
    alive = torch.cat([group.alive for group in groups], 2)
    mass = torch.cat([group.mass for group in groups], 2)
    mass = torch.nan_to_num_(mass, nan=0.0, posinf=0.0).masked_fill_(~alive, 0.0)
    first = torch.cat([group.first for group in groups], 2)
    size = torch.cat([group.first.new_full(group.first.shape[2:], group.size) for group in groups])
    keys = mass[..., : groups[0].first.shape[2]]
    total = mass.sum(-1, keepdim=True)
    for _ in range(_CLIP_ROUNDS):
        # the even share comes on top, so this is one draw's share of the rest
        torch.minimum(keys, total / (num * (1 - uniform_share)), out=keys)
        total = mass.sum(-1, keepdim=True)
    begin, hole_begin, hole_end, end = left
    count = (hole_begin - begin + end - hole_end).clamp(min=1)
    tiny = torch.finfo(mass.dtype).tiny
    mass.mul_((1 - uniform_share) / total.clamp(min=tiny)).add_(alive * (size * uniform_share / count))
    return Leaves(first, size, mass.div_(mass.sum(-1, keepdim=True).clamp(min=tiny)))
