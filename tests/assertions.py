"""The assertions that every test of tensors makes, so that none carries a tolerance of its own.

Python numbers that both sides work out in double precision, such as means of a few figures, are compared by pytest.approx
with its own tolerance. Where a test names another one, the line above says what was rounded, or which estimate it is of.
"""

import math

import torch
from torch import Tensor

# an honest estimator fails at 4.5 standard errors once in 150,000 statistics; a wrong weight is tens of them away
STANDARD_ERRORS = 4.5
# rounding steps by which two orders of the same float operations may differ: their sums run over a few hundred terms
ROUNDING_STEPS = 32


def _error(ours: Tensor, reference: Tensor) -> float:
    finite = torch.isfinite(reference)
    return (ours.double() - reference)[finite].abs().max().item() if finite.any() else 0.0


def _assert_same_holes(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape, f"shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    hole = ~torch.isfinite(reference)
    assert torch.equal(~torch.isfinite(ours), hole), "values that are not finite stand in other places than the reference's"
    assert torch.equal(ours[hole].double().nan_to_num(), reference[hole].double().nan_to_num()), "infinities differ"


def assert_same_math(ours: Tensor, reference64: Tensor, plain_torch: Tensor) -> None:
    """Our error is at most twice that of plain PyTorch in the same dtype, and one rounding step (flash-attention's rule)."""
    assert reference64.dtype == torch.float64, "the reference must be float64"
    assert ours.dtype == plain_torch.dtype, f"{ours.dtype} cannot be judged by plain PyTorch in {plain_torch.dtype}"
    if ours.dtype == torch.float64:
        # a reference of the same precision cannot tell whose rounding it was
        return assert_exact(ours, reference64)
    _assert_same_holes(ours, reference64)
    size = reference64[torch.isfinite(reference64)].abs().max().item() if torch.isfinite(reference64).any() else 0.0
    step = torch.finfo(ours.dtype).eps * size
    error, allowed = _error(ours, reference64), 2 * _error(plain_torch, reference64) + step
    assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}, twice plain PyTorch's and a rounding step"


def assert_unbiased(estimates: Tensor, truth: Tensor | float, *, largest_error: float, rounding: float = 0.0) -> None:
    """The mean of a fixed number of estimates is the truth, and they are precise enough for that to mean something.

    Args:
        estimates: one row a draw, ``[draws, ...]``.
        truth: the expected value of each statistic.
        largest_error: bound on the standard errors, so that a noisy estimator cannot pass by its noise.
        rounding: error of a single estimate's arithmetic, where a statistic does not vary at all.
    """
    estimates = estimates.double()
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert error.max() <= largest_error, f"standard error {error.max():.3g} exceeds {largest_error}: this proves nothing"
    off = ((estimates.mean(0) - truth).abs() - rounding).clamp(min=0)
    worst = (off / error.clamp(min=torch.finfo(torch.float64).tiny)).max().item()
    assert worst <= STANDARD_ERRORS, f"the mean is {worst:.3g} standard errors from the truth"


def assert_exact(ours: Tensor, expected: Tensor, *, size: float | None = None) -> None:
    """Two ways to the same number: equal to rounding in the coarser of the two dtypes.

    Args:
        ours: one way.
        expected: the other.
        size: of what was rounded on the way; the largest value expected if None.
    """
    _assert_same_holes(ours, expected)
    eps = max(torch.finfo(x.dtype).eps for x in (ours, expected))
    finite = expected[torch.isfinite(expected)].double()
    size = size or (finite.abs().max().item() if finite.numel() else 0.0)
    error, allowed = _error(ours, expected.double()), ROUNDING_STEPS * eps * size
    assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}, {ROUNDING_STEPS} rounding steps of {size:.3g}"


def assert_same_bits(ours: Tensor, expected: Tensor) -> None:
    """The same computation: not one bit differs."""
    assert ours.shape == expected.shape, f"shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    assert ours.dtype == expected.dtype, f"{ours.dtype}, expected {expected.dtype}"
    differs = ours != expected
    assert torch.equal(ours, expected), f"{int(differs.sum())} of {differs.numel()} values differ"
