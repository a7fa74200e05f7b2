"""The error of the sampled rows: rows of any output compared with exact rows."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hyperattention.error.exact_rows import exact_rows
from hyperattention.error.row_statistics import operator_norm
from hyperattention.error.sampled_rows import ExactSample, SampledRows, measure_rows


@dataclass(frozen=True)
class HeadErrors:
    """Errors and other figures of each head, from the sampled rows.

    Args:
        errors: relative error of each row; undefined for rows that are not live.
        live: whether each row sees at least one key.
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
        out: the output to measure.
        key_mask: True = attend.
        sample: the rows.

    Returns:
        errors and the figures that come from the same softmax weights.
    """
    return compare(measure_rows(query, key, value, key_mask, sample), out.index_select(2, sample.index))


def compare(measured: ExactSample, rows_out: Float[Tensor, "batch heads rows value_dim"]) -> HeadErrors:
    """Compare an output with exact rows that were computed before.

    Args:
        measured: the exact rows.
        rows_out: the same rows of the output.

    Returns:
        errors, and the figures that do not depend on the output.
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
    """Compare sampled rows of an output with exact ones, without any other figures.

    Args:
        query: queries.
        key: keys.
        value: values.
        out: the output to measure.
        key_mask: True = attend.
        index: the rows.
        visible: number of leading keys that each row may see.
        scale: factor of the scores.

    Returns:
        errors; figures that need softmax weights are NaN.
    """
    rows = query.index_select(2, index)
    exact = exact_rows(rows, key, value, visible, scale, key_mask)
    # a row is live if it may see at least one live key
    live = (visible > 0).expand(len(key), -1)
    if key_mask is not None:
        live = torch.nn.functional.pad(key_mask.long().cumsum(1), (1, 0))[:, visible] > 0
    difference = (out.index_select(2, index).to(exact.dtype) - exact).masked_fill(~live[:, None, :, None], 0.0)
    error = relative_error(difference, exact)
    unknown = error.new_full(error.shape[:2], torch.nan)
    return HeadErrors(error, live, unknown, unknown, unknown)


def relative_error(difference: Tensor, exact: Tensor) -> Tensor:
    """Return the relative error of each row: infinite if the exact row is 0, unless the output is 0 too.

    Args:
        difference: an output minus the exact one.
        exact: the exact output.

    Returns:
        the error of each row.
    """
    miss = torch.linalg.vector_norm(difference, dim=-1)
    return (miss / torch.linalg.vector_norm(exact, dim=-1)).masked_fill(miss == 0, 0.0)
