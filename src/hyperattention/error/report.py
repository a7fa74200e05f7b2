"""What an audit found, as a value that prints in one line."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ErrorReport:
    """The measured error of one attention output against exact rows, with its interval: a head at a time.

    The intervals speak of the rows of this output, sampled; not of what other seeds would have given.

    Args:
        relative_error: mean over the sampled rows of ||out_i - exact_i|| / ||exact_i||.
        interval: low and high end of the 95% interval of that mean over all rows.
        percentile_95_bound: with 95% confidence, 95% of the rows err less; NaN below 59 rows.
        operator_error: estimate of ||out - exact|| / (||softmax matrix|| ||value||), operator norms, made to err upwards.
        alpha: estimate of keys * (largest squared norm of a column of the softmax matrix), made to err upwards.
        kappa: ratio of the largest to the smallest row sum outside the heavy mask; over the sampled rows, so a lower
            bound. NaN where no sampled row sees a key outside the mask.
        share_of_pairs: pairs the method lists relative to exact attention's; None if the method is unknown.
        num_rows: rows sampled a head.
        num_empty: sampled rows that see nothing, which count in nothing above.
    """

    relative_error: Float[Tensor, "batch heads"]
    interval: tuple[Float[Tensor, "batch heads"], Float[Tensor, "batch heads"]]
    percentile_95_bound: Float[Tensor, "batch heads"]
    operator_error: Float[Tensor, "batch heads"]
    alpha: Float[Tensor, "batch heads"]
    kappa: Float[Tensor, "batch heads"]
    share_of_pairs: float | None
    num_rows: int
    num_empty: Int[Tensor, " batch"]

    def __str__(self) -> str:
        """Say in one line what was measured, on average and for the worst head."""
        low, high = self.interval
        text = f"relative error {_span(self.relative_error, low, high, None)}, {self.num_rows} rows a head"
        if self.share_of_pairs is not None:
            text += f", {self.share_of_pairs:.3g} of exact's pairs"
        if self.relative_error.numel() > 1:
            # NaN counts as the worst: it must not hide
            worst = int(self.relative_error.nan_to_num(nan=torch.inf).argmax())
            batch, head = divmod(worst, self.relative_error.shape[1])
            text += f"; worst: head {head} of batch {batch}, {_span(self.relative_error, low, high, worst)}"
        return text


def _span(middle: Tensor, low: Tensor, high: Tensor, index: int | None) -> str:
    """Print one head, or the mean over heads: the mean of the heads' ends spans the mean of their errors."""
    shown = [float(x.double().mean() if index is None else x.flatten()[index]) for x in (middle, low, high)]
    return f"{shown[0]:.2g} (95% CI {shown[1]:.2g}-{shown[2]:.2g})"
