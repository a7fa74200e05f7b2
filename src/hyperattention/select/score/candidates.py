"""Candidates: the keys of a tile that every list scores, and the law of draws from them and from all others."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.select.density import Distribution
from hyperattention.select.score.mass import inverse, total_mass
from hyperattention.select.score.stretches import LEAST, keys_left, listings_of


def candidates_of(
    log_share: Float[Tensor, "lists tiles keys"], left: tuple[Tensor, ...], count: int
) -> Int[Tensor, "lists tiles candidates"]:
    """Find the keys of the largest shares among those that earlier stages left and some query knows.

    Args:
        log_share: logarithm of the largest share that some query of a tile gives each key, estimated; overwritten.
        left: what earlier stages left, from `edges`, for each tile.
        count: candidates of each tile.

    Returns:
        their numbers, ascending; where there are fewer, the number of keys stands behind them.
    """
    key, none = torch.arange(log_share.shape[2], dtype=torch.int64, device=log_share.device), log_share.shape[2]
    log_share.masked_fill_(~_inside(key, left), -torch.inf)
    best = log_share.topk(min(count, none), sorted=False)
    return best.indices.masked_fill_(best.values == -torch.inf, none).sort(dim=2)[0]


def _inside(key: Tensor, left: tuple[Tensor, ...]) -> Tensor:
    """Tell which keys earlier stages left."""
    begin, hole_begin, hole_end, end = left
    return ((key >= begin) & (key < hole_begin)) | ((key >= hole_end) & (key < end))


@dataclass(frozen=True)
class Candidates(Distribution):
    """How often candidates are expected to be listed, and all other keys that are left, each as often.

    Args:
        key: number of each, ascending.
        place: the same, counted over the keys that are left; beyond them for one that is not left.
        left: what earlier stages left, from `edges`, for each tile.
        listings: expected listings of each candidate, and of all other keys together, up to a factor.
    """

    key: Int[Tensor, "lists tiles candidates"]
    place: Int[Tensor, "lists tiles candidates"]
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
            key: from `candidates_of`.
            left: what earlier stages left, from `edges`, for each tile.
            num: draws of each list.
            even: share of the draws that is spread evenly over the keys.

        Returns:
            the law, of ``tiles * many`` lists.
        """
        begin, hole_begin, hole_end, _ = left
        inside, count = _inside(key, left), keys_left(left)
        place = torch.where(key < hole_begin, key - begin, key - hole_end + hole_begin - begin)
        listings, evenly = listings_of(share, inside.long(), count, num, even, 1)
        others = (count - inside.sum(2, keepdim=True))[:, :, None].to(listings.dtype)
        return cls(key, torch.where(inside, place, count), left, torch.cat([listings, others * evenly], 3))

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Find the candidate at each evenly spaced point, or the key at the same share of the way through the others.

        Args:
            point: ``[lists, tiles * many, slots]``.

        Returns:
            keys and their probabilities in a single draw, of the same shape.
        """
        # in float64: one step of float32 can be more than a key where others are many
        at, inside = inverse(self.listings.double(), point.unflatten(1, self.listings.shape[1:3]))
        others, last = self._others[:, :, None], self.key.shape[2]
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
        size = torch.where(found, 1, self._others[:, :, None])
        inside = _inside(flat, self.left).view_as(index)
        return (listed / (size.clamp(min=1) * self._total)).masked_fill(~inside, 0.0).flatten(1, 2)

    @property
    def _total(self) -> Tensor:
        return total_mass(self.listings).clamp(min=LEAST)

    @property
    def _others(self) -> Int[Tensor, "lists tiles 1"]:
        """Count the keys left that are no candidates."""
        count = keys_left(self.left)
        return count - (self.place < count).sum(2, keepdim=True)

    def _other(self, rank: Tensor) -> Tensor:
        """Number the keys that are no candidates: the one before which so many others stand."""
        begin, hole_begin, hole_end, _ = (x[:, :, None] for x in self.left)
        # so many others stand before each candidate; all of them, and more than any rank, before places without one
        count = keys_left(self.left)
        number = torch.arange(self.place.shape[2], dtype=torch.int64, device=rank.device)
        before = torch.where(self.place < count, self.place - number, count)
        place = rank + torch.searchsorted(before, rank.flatten(2), right=True).view_as(rank)
        return torch.where(place < hole_begin - begin, begin + place, place - (hole_begin - begin) + hole_end)
