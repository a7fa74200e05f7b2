"""The report of an audit: a value that prints in one line."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.error.interval import format_lack, format_mean


@dataclass(frozen=True)
class ErrorReport:
    """The measured error of one attention output relative to exact rows, with its interval, for each head.

    The intervals hold for all rows of this output, from which rows were sampled. They do not hold for other seeds.

    Args:
        relative_error: mean over the sampled rows of ||out_i - exact_i|| / ||exact_i||.
        interval: low and high end of the 95% interval of that mean over all rows.
        percentile_95_bound: with 95% confidence, 95% of the rows have a smaller error; NaN for fewer than 59 rows.
        operator_error: estimate of ||out - exact|| / (||softmax matrix|| ||value||), operator norms, biased upwards.
        alpha: estimate of keys * (largest squared norm of a column of the softmax matrix), biased upwards.
        kappa: ratio of the largest to the smallest row sum outside the heavy mask; over the sampled rows, so a lower
            bound. NaN if no sampled row sees a key outside the mask.
        share_of_pairs: pairs that the method lists relative to exact attention's; None if the method is unknown.
        num_rows: number of rows sampled per head.
        num_empty: number of sampled rows that see no key; they do not enter any other figure.
        num_clamped: number of rows, sampled or not, that lost a part to rounding; None for a method that loses none, or if
            only its output is known.
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
    num_clamped: Int[Tensor, "batch heads"] | None = None

    def __str__(self) -> str:
        """Print in one line the measured error, on average and for the worst head."""
        rows = self.num_rows - max(self.num_empty.tolist(), default=0)
        # over heads: the means of the low and high ends contain the mean of the errors
        mean, low, high = (float(each.double().mean()) for each in (self.relative_error, *self.interval))
        text = (
            f"relative error {format_mean(mean, low, high, rows)}, {self.num_rows} rows a head{format_lack(low, high, rows)}"
        )
        if self.share_of_pairs is not None:
            text += f", {self.share_of_pairs:.3g} of exact's pairs"
        if self.relative_error.numel() > 1:
            # NaN counts as the worst: it must not hide
            worst = int(self.relative_error.nan_to_num(nan=torch.inf).argmax())
            batch, head = divmod(worst, self.relative_error.shape[1])
            mean, low, high = (float(each.flatten()[worst]) for each in (self.relative_error, *self.interval))
            text += f"; worst: head {head} of batch {batch}, {format_mean(mean, low, high, rows)}"
        if self.num_clamped is not None:
            text += f"; {int(self.num_clamped.sum())} rows lost a part to rounding"
        return text
