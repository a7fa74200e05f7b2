"""Log scales as powers of two times a number in [1, 2): another base changes exponents alone, and not one bit of a sum."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scales:
    """exp(log scale) = factor * 2^exponent.

    Args:
        factor: in [1, 2).
        exponent: whole numbers in a floating dtype; -inf where the log scale is.
    """

    factor: Tensor
    exponent: Tensor

    def __getitem__(self, index) -> "Scales":
        """Select some of them."""
        return Scales(self.factor[index], self.exponent[index])

    def times(self, exponent: Tensor) -> Tensor:
        """Return exp(log scale) 2^exponent."""
        return self.factor * (self.exponent + exponent).exp2()


def scales_of(log_scale: Tensor) -> Scales:
    """Split log scales.

    Args:
        log_scale: natural logarithms, float32 or float64.

    Returns:
        factors and exponents in the same dtype; the factor of -inf is 1.
    """
    # in float64: a float32 quotient of 500 would be wrong by 3e-5
    double = log_scale.double() / math.log(2)
    whole = double.floor()
    factor = (double - finite(whole)).exp2().masked_fill(whole == -torch.inf, 1.0)
    return Scales(factor.to(log_scale.dtype), whole.to(log_scale.dtype))


def log_of(sums: Tensor, exponent: Tensor) -> Tensor:
    """Return the natural logarithm of sums * 2^exponent, the same bits for whatever exponent was taken out."""
    mantissa, own = torch.frexp(sums)
    return mantissa.log() + (own + exponent) * math.log(2)


def finite(base: Tensor) -> Tensor:
    """Replace the base of rows that saw no key: -inf minus -inf would be NaN."""
    return base.masked_fill(base == -torch.inf, 0.0)
