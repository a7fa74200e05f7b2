"""Positive random features of the softmax kernel: their inner products are unbiased estimates of exp(q.k * scale)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.check import positive
from hyperattention.random import normal

# last counters of the draws, which no other draw of six counters has
_DIRECTION, _LENGTH = 5, 6


@dataclass(frozen=True)
class PositiveRandom:
    """Map queries and keys to positive features whose inner products estimate the softmax kernel without bias.

    phi_r(x) = m^-1/2 u_r exp(+-w_r . x s^1/2 - ||x||^2 s / 2),   E[phi(q) . phi(k)] = exp(s q . k),   s the scale
    w_r ~ N(0, spread I),   u_r^2 = spread^(head_dim / 2) exp(-||w_r||^2 (1 - 1 / spread) / 2),   which is 1 if spread = 1

    Each drawn w serves two features, of +w and of -w. The relative variance of the estimate by one w alone, with
    z = s ||q + k||^2 and d = head_dim, is

        spread^d (2 spread - 1)^(-d / 2) exp(z / (2 spread - 1)) - 1

    It grows exponentially with the norms of queries and keys. A `spread` above 1 divides the exponent, and costs a factor
    that grows with d.

    Source: Choromanski et al., 2021 (arXiv:2009.14794), Performers, FAVOR+: positive features, pairs of +w and -w,
    orthogonal blocks. `spread`: Likhosherstov et al., 2022 (arXiv:2205.15317), Chefs' random tables, their parameter
    A = (1 - spread) / 4, written as importance sampling.   Differs: the largest exponent of every row and of every key is a
    log scale of its own, where FAVOR+ takes one maximum of all keys, so no feature depends on another token; frequencies are
    drawn by the hash.
    Cost: num / 2 products of a token; one orthogonal factorisation per kv head and head_dim frequencies.
    Guarantee: unbiased for every pair; orthogonal blocks have a smaller variance than independent frequencies.

    Args:
        num: number of features, even.
        orthogonal: whether the directions of `head_dim` frequencies at a time are orthogonal; lengths are those of Gaussian
            vectors either way.
        spread: variance of the coordinates of the frequencies, at least 1.

    Raises:
        ValueError: if `num` is not a positive even integer, or `spread` is below 1 or not finite.
    """

    num: int
    orthogonal: bool = True
    spread: float = 1.0

    def __post_init__(self) -> None:
        positive("PositiveRandom", num=self.num)
        if self.num % 2:
            raise ValueError(f"PositiveRandom(num={self.num}): features come in pairs of +w and -w; use an even number")
        if not 1 <= self.spread < math.inf:
            raise ValueError(f"PositiveRandom(spread={self.spread!r}): it must be finite and at least 1; 1 is FAVOR+")

    def frequencies(
        self, head_dim: int, head: Int[Tensor, " kv_heads"], *, seed: int, layer: int = 0
    ) -> Float[Tensor, "kv_heads pairs head_dim"]:
        """Draw the frequencies w of every kv head: a pure function of seed, layer and head.

        Args:
            head_dim: width of queries and keys.
            head: indices of the kv heads in the model's layer.
            seed: seed of the draws.
            layer: layer of the model, so that layers draw independently.

        Returns:
            num / 2 frequencies for each head, float64.
        """
        pairs, device = self.num // 2, head.device
        blocks = -(-pairs // max(1, head_dim))
        row, axis = (torch.arange(size, dtype=torch.int64, device=device) for size in (blocks * head_dim, head_dim))
        counters = (seed, layer, head[:, None, None], row[:, None], axis)
        frequency = normal((*counters, _DIRECTION), device)
        if self.orthogonal:
            factor, triangle = torch.linalg.qr(frequency.unflatten(1, (blocks, head_dim)))
            # without the signs the factor would follow a convention, not Haar's measure
            factor = factor * triangle.diagonal(dim1=2, dim2=3).sign()[:, :, None]
            length = torch.linalg.vector_norm(normal((*counters, _LENGTH), device), dim=-1, keepdim=True)
            frequency = factor.flatten(1, 2) * length
        return frequency[:, :pairs] * math.sqrt(self.spread)

    def map(
        self,
        x: Float[Tensor, "batch heads tokens head_dim"],
        frequency: Float[Tensor, "kv_heads pairs head_dim"],
        scale: float,
    ) -> tuple[Float[Tensor, "batch heads tokens features"], Float[Tensor, "batch heads tokens"]]:
        """Compute the features of queries, or of keys, with a log scale of each token.

        Args:
            x: queries or keys; `heads` must be a multiple of `kv_heads`: query heads share the frequencies of their kv head.
            frequency: from `frequencies`.
            scale: factor of the scores, not negative.

        Returns:
            features between 0 and 1 whose largest is 1, and the log of what multiplies them, float32 (float64 for float64).
        """
        (kv_heads, pairs, head_dim), each = frequency.shape, (x.shape[1] // max(1, frequency.shape[0]), x.shape[2])
        x = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (kv_heads, each[0])).flatten(2, 3)
        x = x * math.sqrt(scale)
        projected = x @ frequency.to(x.dtype).transpose(1, 2)  # [batch, kv_heads, group * tokens, pairs]
        # half of the log of u^2 / m: a query and a key bring one half each
        log_weight = frequency.square().sum(-1) * (-(1 - 1 / self.spread) / 4)
        log_weight = log_weight + (head_dim / 4 * math.log(self.spread) - math.log(2 * pairs) / 2)
        exponent = torch.cat([projected, -projected], -1) + log_weight.to(x.dtype).repeat(1, 2)[:, None]
        # features and log scale change by the same factor: the choice of it has no gradient
        top = exponent.detach().amax(-1, keepdim=True)
        log_scale = top[..., 0] - x.square().sum(-1) / 2
        features, log_scale = (y.unflatten(2, each).flatten(1, 2) for y in ((exponent - top).exp(), log_scale))
        return features, log_scale
