"""The law of draws from short stretches of neighbouring keys, each with an estimated share."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.select.density import Distribution, Even
from hyperattention.select.score.mass import inverse, total_mass

# rounds in which a stretch's listings are cut to one a key and the rest is given to the others
CLIP_ROUNDS = 4
# sums below count as none: draws over one of them would overflow
LEAST = 1e-30


@dataclass(frozen=True)
class Stretches(Distribution):
    """How often stretches are expected to be listed, each of a stretch's keys equally often.

    Args:
        first: first key of each, for all lists of a tile.
        size: keys in each; 0 where nothing is left of it.
        listings: expected listings of each, up to a factor.
    """

    first: Int[Tensor, "lists tiles stretches"]
    size: Int[Tensor, "lists tiles stretches"]
    listings: Float[Tensor, "lists tiles many stretches"]

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Find the stretch at each evenly spaced point, then the key at the same share of the way through it.

        Args:
            point: ``[lists, tiles * many, slots]``.

        Returns:
            keys and their probabilities in a single draw, of the same shape.
        """
        at, inside = inverse(self.listings, point.unflatten(1, self.listings.shape[1:3]))
        first, size = self._of(at)
        key = first + (inside * size).long().clamp(max=size - 1)
        return key.flatten(1, 2), self._chance(at, size).flatten(1, 2)

    def share(self, index: Tensor) -> Tensor:
        """Look up the stretch that holds each key; stretches that nothing is left of hold none."""
        index = index.unflatten(1, self.listings.shape[1:3])
        ends = (self.first + self.size).masked_fill(self.size == 0, 0).cummax(-1)[0]
        at = torch.searchsorted(ends, index.flatten(2), right=True).clamp(max=ends.shape[2] - 1).view_as(index)
        first, size = self._of(at)
        chance = self._chance(at, size).masked_fill((index < first) | (index >= first + size), 0.0)
        return chance.flatten(1, 2)

    def _of(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Give the first keys of stretches, and how many each has."""
        flat = at.flatten(2)
        return self.first.gather(2, flat).view_as(at), self.size.gather(2, flat).view_as(at)

    def _chance(self, at: Tensor, size: Tensor) -> Tensor:
        return self.listings.gather(3, at) / (size.clamp(min=1) * total_mass(self.listings).clamp(min=LEAST))


def stretches_of(
    share: Float[Tensor, "lists tiles many blocks"], block_size: int, left: tuple[Tensor, ...], num: int, even: float,
    to_the_end: bool,
) -> Stretches:  # fmt: skip
    """Return how often what is left of each block is to be listed.

    Args:
        share: the largest share that a query of each of `many` lists gives a key of each block; overwritten.
        block_size: keys in a block.
        left: what earlier stages left, from `edges`, for each tile.
        num: draws of each list.
        even: share of the draws that is spread evenly over the keys.
        to_the_end: whether something may be left beyond the hole.

    Returns:
        the law, of ``tiles * many`` lists.
    """
    begin, hole_begin, hole_end, end = left
    edge = torch.arange(share.shape[3] + 1, dtype=torch.int64, device=share.device) * block_size
    sides = [(begin, hole_begin), (hole_end, end)] if to_the_end else [(begin, hole_begin)]
    edges = [torch.minimum(torch.maximum(edge, low), high) for low, high in sides]
    first, size = (torch.cat(x, 2) for x in zip(*((at[..., :-1], at.diff(dim=-1)) for at in edges), strict=True))
    mass = torch.cat([share, share], 3) if to_the_end else share
    return Stretches(first, size, listings_of(mass, size, keys_left(left), num, even, block_size)[0])


def keys_left(left: tuple[Tensor, ...]) -> Int[Tensor, "lists tiles 1"]:
    """Count the keys that earlier stages left to each tile."""
    begin, hole_begin, hole_end, end = left
    return hole_begin - begin + end - hole_end


def listings_of(
    share: Float[Tensor, "lists tiles many stretches"], size: Int[Tensor, "lists tiles stretches"],
    count: Int[Tensor, "lists tiles 1"], num: int, even: float, largest: int,
) -> tuple[Float[Tensor, "lists tiles many stretches"], Float[Tensor, "lists tiles many 1"]]:  # fmt: skip
    """Return how often each stretch of keys is to be listed: by its share, but no key more than once; the rest evenly.

    Args:
        share: the largest share that a query of each of `many` lists gives a key of each stretch; overwritten.
        size: keys left of each.
        count: keys left in all.
        num: draws of each list.
        even: share of the draws that is spread evenly over all keys left.
        largest: most keys in a stretch.

    Returns:
        expected listings up to a factor, and those of a single key by even draws alone.
    """
    room, weighted = size[:, :, None].to(share.dtype), (1 - even) * num
    mass, count = share.mul_(room), count.clamp(min=1)[:, :, None].to(share.dtype)
    for _ in range(CLIP_ROUNDS):
        most = total_mass(mass) / weighted
        torch.minimum(mass, most if largest == 1 else room * most, out=mass)
    total = total_mass(mass)
    # where nothing was scored all draws are even
    evenly = torch.ones_like(total).masked_fill_(total > 0, even) * (num / count)
    mass.mul_(weighted / total.clamp(min=LEAST)).addcmul_(room, evenly)
    # what an even draw adds to keys listed for certain is worth more to others
    return torch.minimum(mass, room, out=mass), evenly


def draws_of(
    law: Distribution, left: tuple[Tensor, ...], noise: Tensor, num: int
) -> tuple[Int[Tensor, "lists rows num"], Float[Tensor, "lists rows num"]]:
    """Draw from a law, or list all keys where they are few.

    Args:
        law: how often keys are to be listed, for ``tiles * many`` lists.
        left: what earlier stages left, from `edges`, for each tile.
        noise: where inside a slot each list's points lie, ``[lists, tiles * many, 1]``.
        num: draws of each list.

    Returns:
        keys and their log-weights.
    """
    slot = torch.arange(num, dtype=torch.int64, device=noise.device)
    index, chance = law.draw((slot + noise) / num)
    # a law with nothing to draw from drew keys to which it gives no chance: empty slots
    weight = (-(chance * num).log()).masked_fill(chance == 0, -torch.inf)
    begin, hole_begin, hole_end, end = (x.repeat_interleave(noise.shape[1] // x.shape[1], 1) for x in left)
    evenly = Even((begin, hole_begin, hole_end, end))
    few = evenly.count <= num
    all_of_them = evenly.at((slot.double() + 0.5) / evenly.count.clamp(min=1))
    listed = torch.zeros_like(weight).masked_fill_(slot >= evenly.count, -torch.inf)
    return torch.where(few, all_of_them, index), torch.where(few, listed, weight)
