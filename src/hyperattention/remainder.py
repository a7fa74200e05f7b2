"""Take some keys out of attention over all of them: what is left, and the rows in which rounding leaves nothing to tell."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from hyperattention.types import Partial

# rounding steps of the two logs below which their difference is taken for rounding
STEPS = 8


@dataclass(frozen=True)
class Remainder:
    """What is left of a partial result without some of its keys.

    Args:
        partial: attention over the keys that are left.
        clamped: rows whose remainder is below what rounding can tell: they have out 0 and lse -inf.
    """

    partial: Partial
    clamped: Bool[Tensor, "batch heads queries"]


def remainder(whole: Partial, part: Partial) -> Remainder:
    """Subtract attention over some keys from attention over all of them, both with the same weights, none negative.

    lse = log(exp(lse_whole) - exp(lse_part)),   out = (out_whole - r out_part) / (1 - r),   r = exp(lse_part - lse_whole)

    The true difference is never negative, as weights are not. Its rounding error is about that of the two logs. A row is
    clamped to nothing if the logs differ by less than `STEPS` rounding steps of the larger one:

        lse_whole - lse_part < STEPS eps max(1, |lse_whole|)

    In a row that is kept, rounding of the logs changes the rest by at most about 1 / STEPS of it. A clamp loses a rest below
    STEPS eps |lse_whole| of the whole: an estimator that is unbiased before is so afterwards only up to this. A clamped row
    has no gradient.

    Args:
        whole: attention over all keys, in the accumulation dtype, so that rounding is that of `lse`.
        part: attention over some of them.

    Returns:
        the difference; rows in which the part has no key are those of `whole`.
    """
    gap = whole.lse - part.lse
    steps = STEPS * torch.finfo(whole.lse.dtype).eps
    # written so that NaN is kept: it is never hidden
    lost = gap.detach() < steps * whole.lse.detach().abs().clamp(min=1)
    nothing = part.lse == -torch.inf
    clamped = lost & ~nothing
    # the branch not taken must have a finite gradient as well
    safe = gap.masked_fill(clamped | nothing, 1.0)
    share = (-safe).exp()[..., None]
    out = (whole.out - share * part.out) / (1 - share)
    lse = whole.lse + torch.log(-torch.expm1(-safe))
    lse = torch.where(nothing, whole.lse, lse).masked_fill(clamped, -torch.inf)
    out = torch.where(nothing[..., None], whole.out, out).masked_fill(clamped[..., None], 0.0)
    return Remainder(Partial(out, lse), clamped)
