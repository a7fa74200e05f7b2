"""Merge attention over disjoint sets of keys: the only place where partial results are combined."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from hyperattention.types import Partial


def merge(partials: Sequence[Partial]) -> Partial:
    """Combine attention over several disjoint sets of keys into attention over all of them.

    lse = log sum_p exp(lse_p),   out = sum_p exp(lse_p - lse) out_p

    Associative and commutative up to rounding. A partial that saw no key (out 0, lse -inf) changes nothing. The gradient is
    that of the formula, through every lse too, and 0 for rows that saw no key.

    Args:
        partials: at least one, over the same queries.

    Returns:
        the merged rows, in the widest dtype given; a single partial is returned unchanged.

    Raises:
        ValueError: if `partials` is empty, or the partials differ in shape.
    """
    if not partials:
        raise ValueError("merge([]) has nothing to merge: give at least one Partial")
    shapes = {(tuple(p.out.shape), tuple(p.lse.shape)) for p in partials}
    if len(shapes) > 1:
        raise ValueError(f"partials of shapes {sorted(shapes)} cannot be merged: all must be for the same queries")
    if len(partials) == 1:
        return partials[0]
    lse = torch.stack([p.lse for p in partials])  # [partials, batch, heads, queries]
    top = lse.detach().amax(0)
    # rows that saw no key take any finite number here: -inf minus -inf would be NaN
    top = top.masked_fill(top == -torch.inf, 0.0)
    share = (lse - top).exp()
    total = share.sum(0)
    empty = total == 0
    # 1 in empty rows, because the gradient of a branch not taken must be finite as well
    total = total.masked_fill(empty, 1.0)
    share = share / total
    weighted = (w[..., None] * p.out.to(w.dtype) for w, p in zip(share, partials, strict=True))
    out = reduce(torch.add, weighted)
    dtype = reduce(torch.promote_types, (p.out.dtype for p in partials))
    return Partial(out.to(dtype), (top + total.log()).masked_fill(empty, -torch.inf))


def without_sinks(part: Partial, sinks: Tensor) -> Partial:
    """Remove the share of learned sinks from attention over all keys.

    out <- out exp(lse) / (exp(lse) + exp(sink))

    Args:
        part: rows over all keys, without the sinks.
        sinks: logit of each query head that belongs to no key, ``[heads]``.

    Returns:
        the rows and their log-sum-exp, sinks included.
    """
    logit = sinks.to(part.lse.dtype)[None, :, None]
    share = torch.sigmoid(part.lse - logit)
    return Partial((part.out * share[..., None]).to(part.out.dtype), torch.logaddexp(part.lse, logit))
