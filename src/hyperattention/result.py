"""The results of a measured call: the output, and by name the reports that were asked for."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.error.report import ErrorReport
from hyperattention.error.tolerance.report import ToleranceReport


@dataclass(frozen=True)
class AttentionResult:
    """The output of one call with its log-sum-exp, and the reports that were asked for.

    Args:
        out: the output, in the dtype of the query.
        lse: log-sum-exp of every row, natural logarithm, float32 (float64 for float64 input); -inf if a row sees no key.
        standard_error: standard error of every row's output, absolute; None if it was not asked for.
        audit: error measured on exact rows; None if it was not asked for.
        tolerance: the method that ran for each head, and the bounds of their errors; None if no tolerance was given.
        clamped: rows of every head that lost a part to rounding, such as the low-rank part of `Scatterbrain`; None for a
            method that loses none, and in a graph.
    """

    out: Float[Tensor, "batch heads queries value_dim"]
    lse: Float[Tensor, "batch heads queries"]
    standard_error: Float[Tensor, "batch heads queries"] | None = None
    audit: ErrorReport | None = None
    tolerance: ToleranceReport | None = None
    clamped: Int[Tensor, "batch heads"] | None = None


@dataclass(frozen=True)
class SequencesResult:
    """The results of a call with several sequences, packed or in pages: joint tensors, and one report per sequence.

    Args:
        out: the outputs of all sequences, in the layout that the called function documents.
        lse: log-sum-exp of every row, in the corresponding layout.
        standard_error: standard error of every row; None if it was not asked for.
        audit: one report for each sequence, None for one without queries or keys; empty if no audit was asked for.
        tolerance: one report for each sequence; empty if no tolerance was given.
    """

    out: Float[Tensor, "..."]
    lse: Float[Tensor, "..."]
    standard_error: Float[Tensor, "..."] | None = None
    audit: tuple[ErrorReport | None, ...] = ()
    tolerance: tuple[ToleranceReport, ...] = ()
