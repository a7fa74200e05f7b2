"""Halve the keys repeatedly, so that kept and dropped keys give every query nearly the same sums."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.check import positive
from hyperattention.policies.choose import lottery


@dataclass(frozen=True)
class BalancedHalving(Policy):
    """Drop one key of each pair and give its weight to the other, with random signs that depend on earlier signs.

    P(a stays, not b) = 1/2 - D . d / (2 c)   for a pair of equal weights w,   d = w (phi(a) - phi(b)),   D = sum of the +-d
    so far,   phi(x) . phi(y) = exp(scale (k_x - mean) . (k_y - mean)) (v_x . v_y + mean ||v||^2)

    In a pair of unequal weights, the heavier key is first kept with the probability that is left after both get the lighter
    key's probability. Only the other pairs enter the walk, so that each sign is as likely as its opposite.

    Source: Han et al., 2025 (arXiv:2502.07861), BalanceKV; the self-balancing walk is that of Alweiss, Liu and Sawhney, 2021
    (arXiv:2006.14009).   Differs: a constant is added to the products of values, so that the normaliser is balanced too;
    signs belong to pairs of neighbours in order of weight, then position, so that halves are equal; the norms of phi are
    made equal in a walk's kernel, and scores are scaled by `breadth`; any weights and numbers of slots are allowed, and the
    last round pairs only the lightest keys.
    Cost: (head_dim + value_dim) * `pairs` * 4 products per candidate and round, with half the candidates in each next round;
    `pairs` small steps per round.
    Guarantee: the expected weight of every key is its previous weight, so numerator and denominator are unbiased; the total
    weight never changes.

    Args:
        pairs: number of pairs in a walk.
        strength: strength of the correction in a walk; 0 for independent fair coins.
        breadth: factor of the scores in the walk's kernel; below 1, keys also balance more distant keys.

    Raises:
        ValueError: if there is no pair in a walk, the strength is negative, or the breadth is not positive.
    """

    pairs: int = 32
    strength: float = 8.0
    breadth: float = 0.1

    def __post_init__(self) -> None:
        positive("BalancedHalving", pairs=self.pairs)
        if not 0 <= self.strength < math.inf:
            raise ValueError(
                f"BalancedHalving(strength={self.strength!r}): must be finite and not negative; 0 gives fair coins"
            )
        if not 0 < self.breadth < math.inf:
            raise ValueError(
                f"BalancedHalving(breadth={self.breadth!r}): must be positive and finite; 1 leaves scores unchanged"
            )

    @property
    def weighted(self) -> bool:
        """True: the kept keys represent all keys."""
        return True

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Halve until the keys fit the budget."""
        left, turn = full, 0
        while left.end - left.begin > full.num:
            held = self._halved(left, turn)
            left, turn = replace(left, held=held, begin=0, end=held.num_slots), turn + 1
        return left.held

    def _halved(self, full: CompressionRequest, turn: int) -> CacheSlots:
        """Drop one key of every pair, or of as many pairs as necessary."""
        old = full.candidates
        pairs = min(old.num_slots // 2, old.num_slots - full.num)
        count = old.live.sum(-1, keepdim=True)
        needed = torch.minimum(count // 2, (count - full.num).clamp(min=0))
        real = torch.arange(pairs, dtype=torch.int64, device=count.device) < needed
        # the lightest keys are dropped first, and paired with keys of similar weight
        order = old.log_weight.masked_fill(~old.live, torch.inf).argsort(dim=-1, stable=True)[..., : 2 * pairs]
        pair = order.unflatten(-1, (pairs, 2))
        weight = old.log_weight.gather(2, order).view(pair.shape)
        first = self._first_stays(full, turn, pair, weight.masked_fill(~real[..., None], -torch.inf))
        both = torch.logaddexp(*weight.unbind(-1))
        stays = torch.stack([first, ~first], -1)
        new = torch.where(stays, both[..., None], -torch.inf)
        new = old.log_weight.scatter(2, order, torch.where(real[..., None], new, weight).flatten(2))
        index = (new == -torch.inf).byte().argsort(dim=-1, stable=True)[..., : old.num_slots - pairs].sort(-1).values
        return old.take(index, new.gather(2, index))

    def _first_stays(self, full: CompressionRequest, turn: int, pair: Tensor, weight: Tensor) -> Tensor:
        """Draw for every pair whether its first key stays."""
        order = pair.flatten(2)
        certain, coin = (
            lottery(full, 2 * turn + salt, anew=True).gather(2, order).view(pair.shape)[..., 0] for salt in (0, 1)
        )
        share = torch.softmax(weight.double().masked_fill((weight == -torch.inf).all(-1, keepdim=True), 0.0), -1)
        fair = certain <= 2.0 * share.amin(-1)
        amplitude = torch.logsumexp(weight, -1).exp() * fair
        sign = self._walk(self._products(full, order, amplitude), coin.flatten(0, 1)).view(fair.shape)
        return torch.where(fair, sign > 0, share[..., 0] > share[..., 1])

    def _products(self, full: CompressionRequest, order: Tensor, amplitude: Tensor) -> Tensor:
        """Multiply the differences of the pairs of a walk: ``[lists, walks, pairs, pairs]``."""
        old, dtype, live = full.candidates, full.held.log_weight.dtype, full.candidates.live
        count = live.sum(-1).clamp(min=1)[..., None, None]
        k, v = (x.to(dtype).masked_fill(~live[..., None], 0.0) for x in (old.k, old.v))
        constant = v.square().sum((2, 3), keepdim=True) / count
        k = k - k.sum(2, keepdim=True) / count
        k, v = (
            self._in_walks(x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3])).flatten(0, 1), 2) for x in (k, v)
        )
        size = self._in_walks(torch.stack([amplitude, -amplitude], -1).flatten(2).flatten(0, 1)[..., None], 2)
        length = k.square().sum(-1)
        near = 2 * k @ k.transpose(2, 3) - length[..., None] - length[..., None, :]
        product = (0.5 * self.breadth * full.scale * near).exp_() * (v @ v.transpose(2, 3) + constant.flatten(0, 1)[:, None])
        product = product * size * size.transpose(2, 3)
        # the two keys of a pair are adjacent
        return product.unflatten(3, (-1, 2)).sum(-1).unflatten(2, (-1, 2)).sum(3)

    def _in_walks(self, x: Tensor, each: int) -> Tensor:
        """Cut ``[lists, pairs * each, width]`` into walks, with zeros at the end."""
        size = each * min(self.pairs, x.shape[1] // each)
        return pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))

    def _walk(self, product: Tensor, coin: Tensor) -> Tensor:
        """Choose the signs of the pairs in sequence, ``[lists, pairs]``, each against the sum of the previous ones."""
        coin, num = self._in_walks(coin[..., None], 1)[..., 0], coin.shape[1]
        own = product.diagonal(dim1=2, dim2=3)
        limit = own.clamp(min=torch.finfo(own.dtype).tiny)
        sofar, signs = torch.zeros_like(own), []
        for place in range(own.shape[2]):
            tilt = self.strength * sofar[..., place] / limit[..., place]
            signs.append(2.0 * (2.0 * coin[..., place] - 1.0 <= -tilt).to(own.dtype) - 1.0)
            sofar = sofar + signs[-1][..., None] * product[:, :, place]
        return torch.stack(signs, -1).flatten(1)[:, :num]
