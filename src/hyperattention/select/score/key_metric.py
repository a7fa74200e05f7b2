"""How different two queries are to keys: the covariance of the leading keys, as a factor by which queries are multiplied."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.select.score.pooling import score_bytes

# leading keys of one covariance, relative to the one before: a tile then knows that of a quarter of its keys or more
GROWTH = 4
# a share of the trace is added to a covariance, so that its factor exists even if keys span too few directions
RIDGE = 1e-6
# float32 numbers held for each number of a key while products are summed, in float64: in float32, rounding would leave keys
# that span few directions without a factor
_KEY_NUMBERS = 8


@dataclass(frozen=True)
class KeyMetric:
    """Factors of covariances: two queries differ by as much as their scores do, over the keys that their tile knows.

    |(q - q') L|^2 = mean_j ((q - q') . (k_j - mean k))^2,   L L^T = covariance of the leading keys

    Directions in which all keys are alike change no weight, and do not count.

    Args:
        factor: the factors, the identity first.
        first: leading keys of the first covariance; `GROWTH` times as many of each that follows.
    """

    factor: Float[Tensor, "lists factors head_dim head_dim"]
    first: int

    @classmethod
    def of(cls, k: Float[Tensor, "lists keys head_dim"], first: int) -> "KeyMetric":
        """Sum up products of keys.

        Args:
            k: the keys; numbers that are not finite count as 0.
            first: leading keys of the first covariance.

        Returns:
            the factors, in float32 or wider.
        """
        wide, edges = torch.promote_types(k.dtype, torch.float32), [0]
        while (edge := max(edges[-1] * GROWTH, first)) <= k.shape[1]:
            edges.append(edge)
        centre = torch.nan_to_num(k[:, :first].to(wide), nan=0.0, posinf=0.0, neginf=0.0).mean(1, keepdim=True)
        step = max(1, score_bytes(k.device) // (4 * _KEY_NUMBERS * max(1, len(k) * k.shape[2])))
        eye = torch.eye(k.shape[2], dtype=torch.float64, device=k.device).expand(len(k), -1, -1)
        products, total, covariances = torch.zeros_like(eye), eye.new_zeros(len(k), 1, k.shape[2]), []
        for begin, end in pairwise(edges):
            for at in range(begin, end, step):
                part = k[:, at : min(at + step, end)].double() - centre
                part = torch.nan_to_num_(part, nan=0.0, posinf=0.0, neginf=0.0)
                products = products + part.transpose(1, 2) @ part
                total = total + part.sum(1, keepdim=True)
            mean = total / end
            covariances.append(products / end - mean.transpose(1, 2) @ mean)
        return cls(_factors(eye, covariances).to(wide), first)

    def number(self, known: Int[Tensor, "lists tiles"]) -> Int[Tensor, "lists tiles"]:
        """Tell which factor each tile takes: that of the most leading keys among those that all of its queries see.

        Args:
            known: leading keys that all queries of each tile see.

        Returns:
            the factor's number.
        """
        count = torch.arange(self.factor.shape[1] - 1, dtype=torch.int64, device=known.device)
        return (known[..., None] >= self.first * GROWTH**count).sum(-1)

    def of_tiles(self, known: Int[Tensor, "lists tiles"]) -> Float[Tensor, "lists tiles head_dim head_dim"]:
        """Take each tile's factor: see `number`."""
        lists = torch.arange(len(known), dtype=torch.int64, device=known.device)[:, None]
        return self.factor[lists, self.number(known)]


def _factors(eye: Tensor, covariances: list[Tensor]) -> Tensor:
    """Factor covariances, behind the identity."""
    if not covariances:
        return eye[:, None]
    return torch.cat([eye[:, None], factor_of(torch.stack(covariances, 1))], 1)


def factor_of(covariance: Float[Tensor, "lists sets head_dim head_dim"]) -> Float[Tensor, "lists sets head_dim head_dim"]:
    """Factor covariances, relative to their mean variance; no error and no synchronisation where one has no factor.

    Args:
        covariance: the covariances, in float64.

    Returns:
        lower triangles; the identity where a covariance has no factor.
    """
    eye = torch.eye(covariance.shape[2], dtype=covariance.dtype, device=covariance.device)
    variance = covariance.diagonal(dim1=2, dim2=3).mean(2)[..., None, None].clamp(min=torch.finfo(covariance.dtype).tiny)
    factor, info = torch.linalg.cholesky_ex(covariance / variance + RIDGE * eye)
    return torch.where((info == 0)[..., None, None], factor, eye)
