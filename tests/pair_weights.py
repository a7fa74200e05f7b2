"""The weight that every pair of a query and a key gets from a method, read off its output; for any method."""

import torch
from torch import Tensor

from front_door import with_lse
from hyperattention.methods.base import AttentionMethod


def pair_weights(method: AttentionMethod, q: Tensor, k: Tensor, size: Tensor | None = None, **options) -> Tensor:
    """Weights ``[batch, heads, queries, keys]``: what multiplies exp(score) in numerator and denominator.

    Values are the rows of a diagonal matrix, so that each output coordinate tells the weight of one key.

    Args:
        method: the method.
        q: queries, float64.
        k: keys.
        size: norm of each value, ones if None.
        **options: for `attention`.
    """
    size = torch.ones(k.shape[2], dtype=k.dtype) if size is None else size
    v = torch.diag(size).expand(*k.shape[:2], -1, -1)
    out, lse = with_lse(q, k, v, method=method, enable_gqa=True, **options)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
    return out * (lse[..., None] - scores).exp() / size


def replicas(q: Tensor, k: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Repeat one head, or one group, for `count` kv heads, each of which draws for itself."""
    return q.repeat(1, count, 1, 1), k.repeat(1, count, 1, 1)
