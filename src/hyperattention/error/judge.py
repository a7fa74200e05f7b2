"""The rows drawn, judged: exact rows against those of any output."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hyperattention.error.exact_rows import exact_rows
from hyperattention.error.row_statistics import operator_norm
from hyperattention.error.sampled_rows import ExactSample, SampledRows, measure_rows


@dataclass(frozen=True)
class HeadErrors:
    """What the sampled rows show of each head.

    Args:
        errors: relative error of each row; of no meaning in a row that is not live.
        live: rows that see anything.
        operator_error: estimate of the error in the paper's norm.
        alpha: estimate of alpha.
        kappa: lower bound of kappa.
    """

    errors: Float[Tensor, "batch heads rows"]
    live: Bool[Tensor, "batch rows"]
    operator_error: Float[Tensor, "batch heads"]
    alpha: Float[Tensor, "batch heads"]
    kappa: Float[Tensor, "batch heads"]


def judge(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    out: Float[Tensor, "batch heads queries value_dim"],
    key_mask: Bool[Tensor, "batch keys"] | None,
    sample: SampledRows,
) -> HeadErrors:
    """Compare sampled rows of an output with exact ones.

    Args:
        query: queries.
        key: keys.
        value: values.
        out: the output to judge.
        key_mask: True = attend.
        sample: the rows.

    Returns:
        errors and the figures that come from the same softmax weights.
    """
    return compare(measure_rows(query, key, value, key_mask, sample), out.index_select(2, sample.index))


def compare(measured: ExactSample, rows_out: Float[Tensor, "batch heads rows value_dim"]) -> HeadErrors:
    """Judge an output by exact rows that were measured before.

    Args:
        measured: the exact rows.
        rows_out: the same rows of the output.

    Returns:
        errors, and the figures that depend on no output.
    """
    exact = measured.exact
    difference = (rows_out.to(exact.dtype) - exact).masked_fill(~measured.live[:, None, :, None], 0.0)
    error_norm = operator_norm(difference) / measured.size
    return HeadErrors(relative_error(difference, exact), measured.live, error_norm, measured.alpha, measured.kappa)


def misses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    key_mask: Tensor | None,
    index: Tensor,
    visible: Tensor,
    scale: float,
) -> HeadErrors:
    """Compare sampled rows of an output with exact ones, and look at nothing else.

    Args:
        query: queries.
        key: keys.
        value: values.
        out: the output to judge.
        key_mask: True = attend.
        index: the rows.
        visible: leading keys each may see.
        scale: factor of the scores.

    Returns:
        errors; figures that need softmax weights are NaN.
    """
    rows = query.index_select(2, index)
    exact = exact_rows(rows, key, value, visible, scale, key_mask)
    seen = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
    # a row is live if any key it may see is
    live = torch.nn.functional.pad(seen.long().cumsum(1), (1, 0))[:, visible] > 0
    difference = (out.index_select(2, index).to(exact.dtype) - exact).masked_fill(~live[:, None, :, None], 0.0)
    error = relative_error(difference, exact)
    unknown = error.new_full(error.shape[:2], torch.nan)
    return HeadErrors(error, live, unknown, unknown, unknown)


def relative_error(difference: Tensor, exact: Tensor) -> Tensor:
    """Relate norms of rows: infinite where the exact row is 0, unless the output is 0 too.

    Args:
        difference: an output less the exact one.
        exact: the exact output.

    Returns:
        the error of each row.
    """
    miss = torch.linalg.vector_norm(difference, dim=-1)
    return (miss / torch.linalg.vector_norm(exact, dim=-1)).masked_fill(miss == 0, 0.0)
