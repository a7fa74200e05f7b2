"""Candidates: the keys of a tile that every list scores, and the law of draws from them and from all others."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.select.density import Distribution, Even
from hyperattention.select.score.mass import inverse, total_mass

# rounds in which listings are cut to one a key and the rest is given to the others
CLIP_ROUNDS = 4
# sums below count as none: draws over one of them would overflow
LEAST = 1e-30


def _inside(key: Tensor, left: tuple[Tensor, ...]) -> Tensor:
    """Tell which keys earlier stages left."""
    begin, hole_begin, hole_end, end = left
    return ((key >= begin) & (key < hole_begin)) | ((key >= hole_end) & (key < end))


@dataclass(frozen=True)
class Candidates(Distribution):
    """How often candidates are expected to be listed, and all other keys that are left, each as often.

    Args:
        key: number of each, ascending.
        passed: how many of them are left before each of them, and in all.
        before: how many other keys are left before each.
        others: how many other keys are left in all.
        left: what earlier stages left, from `edges`, for each tile.
        listings: expected listings of each candidate, and of all other keys together, up to a factor.
    """

    key: Int[Tensor, "lists tiles candidates"]
    passed: Int[Tensor, "lists tiles listed"]
    before: Int[Tensor, "lists tiles candidates"]
    others: Int[Tensor, "lists tiles 1"]
    left: tuple[Tensor, ...]
    listings: Float[Tensor, "lists tiles many listed"]

    @classmethod
    def of(
        cls, share: Float[Tensor, "lists tiles many candidates"], key: Int[Tensor, "lists tiles candidates"],
        left: tuple[Tensor, ...], num: int, even: float,
    ) -> "Candidates":  # fmt: skip
        """Return how often each candidate is to be listed.

        Args:
            share: the largest share that a query of each of `many` lists gives each candidate; overwritten.
            key: the candidates, ascending; where there are fewer, the number of all keys stands behind them. Those that
                earlier stages took are none.
            left: what earlier stages left, from `edges`, for each tile.
            num: draws of each list.
            even: share of the draws that is spread evenly over the keys.

        Returns:
            the law, of ``tiles * many`` lists.
        """
        begin, hole_begin, hole_end, end = left
        inside, count = _inside(key, left), keys_left(left)
        passed = pad(inside.cumsum(2), (1, 0))
        place = key.clamp(begin, hole_begin) - begin + key.clamp(hole_end, end) - hole_end
        others = count - passed[..., -1:]
        listings, evenly = listings_of(share, inside, count, num, even)
        listings = torch.cat([listings, others[:, :, None].to(listings.dtype) * evenly], 3)
        return cls(key, passed, place - passed[..., :-1], others, left, listings)

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Find the candidate at each evenly spaced point, or the key at the same share of the way through the others.

        Args:
            point: ``[lists, tiles * many, slots]``.

        Returns:
            keys and their probabilities in a single draw, of the same shape.
        """
        # in float64: one step of float32 can be more than a key where others are many
        at, inside = inverse(self.listings.double(), point.unflatten(1, self.listings.shape[1:3]))
        others, last = self.others[:, :, None], self.key.shape[2]
        one = self.key.gather(2, at.clamp(max=last - 1).flatten(2)).view_as(at)
        key = torch.where(at < last, one, self._other((inside * others).long().clamp(max=others - 1)))
        size = torch.where(at < last, 1, others)
        return key.flatten(1, 2), (self.listings.gather(3, at) / (size.clamp(min=1) * self._total)).flatten(1, 2)

    def share(self, index: Tensor) -> Tensor:
        """Look up the probability of each key in a single draw."""
        index = index.unflatten(1, self.listings.shape[1:3])
        last, flat = self.key.shape[2], index.flatten(2)
        at = torch.searchsorted(self.key, flat).clamp(max=last - 1)
        found = (self.key.gather(2, at) == flat).view_as(index)
        listed = self.listings.gather(3, at.view_as(index).masked_fill(~found, last))
        size = torch.where(found, 1, self.others[:, :, None])
        inside = _inside(flat, self.left).view_as(index)
        return (listed / (size.clamp(min=1) * self._total)).masked_fill(~inside, 0.0).flatten(1, 2)

    @property
    def _total(self) -> Tensor:
        return total_mass(self.listings).clamp(min=LEAST)

    def _other(self, rank: Tensor) -> Tensor:
        """Number the keys that are no candidates: the one before which so many others stand."""
        begin, hole_begin, hole_end, _ = (x[:, :, None] for x in self.left)
        flat = rank.flatten(2)
        place = (flat + self.passed.gather(2, torch.searchsorted(self.before, flat, right=True))).view_as(rank)
        return torch.where(place < hole_begin - begin, begin + place, place - (hole_begin - begin) + hole_end)


def keys_left(left: tuple[Tensor, ...]) -> Int[Tensor, "lists tiles 1"]:
    """Count the keys that earlier stages left to each tile."""
    begin, hole_begin, hole_end, end = left
    return hole_begin - begin + end - hole_end


def listings_of(
    share: Float[Tensor, "lists tiles many candidates"], there: Bool[Tensor, "lists tiles candidates"],
    count: Int[Tensor, "lists tiles 1"], num: int, even: float,
) -> tuple[Float[Tensor, "lists tiles many candidates"], Float[Tensor, "lists tiles many 1"]]:  # fmt: skip
    """Return how often each candidate is to be listed: by its share, but no more than once; the rest evenly.

    Args:
        share: the largest share that a query of each of `many` lists gives each candidate; overwritten.
        there: which candidates are keys that are left.
        count: keys left in all.
        num: draws of each list.
        even: share of the draws that is spread evenly over all keys left.

    Returns:
        expected listings up to a factor, and those of a single key by even draws alone.
    """
    room, weighted = there[:, :, None].to(share.dtype), (1 - even) * num
    mass, count = share.mul_(room), count.clamp(min=1)[:, :, None].to(share.dtype)
    for _ in range(CLIP_ROUNDS):
        torch.minimum(mass, total_mass(mass) / weighted, out=mass)
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
