"""Confidence intervals for errors measured on a sample of rows, with an allowance for the rows that were not sampled."""

import math
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.kernels.backend import triton_reads
from hyperattention.kernels.choose.operator_search import uniform_of_tiles
from hyperattention.random import hash_state, uniform

# the relative error of a completely wrong row: an output of zero, or of small unrelated values
WRONG_ROW = 1.0
_LEVEL = 0.95
# the allowance for rows outside the sample is some 3.7 / rows: with fewer rows than this an interval would say little
_LEAST_ROWS = 16
# number of resamples: the level of each 2.5% tail is then accurate to about 0.35%; each uniform gives two resamples, u and 1
# - u
_RESAMPLES = 2048
# first counter of the resampling weights, so that they share no bits with the draws of a method
_STREAM = 0x1A7E


def mean_interval(
    errors: Float[Tensor, "batch heads rows"], live: Bool[Tensor, "batch rows"], cap: float = WRONG_ROW
) -> tuple[Float[Tensor, "batch heads"], Float[Tensor, "batch heads"]]:
    """Bound the mean error of all rows from a sample, with an allowance for rare, completely wrong rows outside the sample.

    low  = 2.5% point of sum_i D_i e_i,   high = 97.5% point of sum_i D_i e_i + D_0 max(cap, max_i e_i),
    D uniform on the simplex of the rows and one extra row, whose error is 0 for the low end and the cap for the high end.
    Source: the interval that Gaffke (2005) and Learned-Miller and Thomas, 2019 (arXiv:1905.06208) propose for bounded
    variables.   Differs: the cap grows with the worst row seen; quantiles by a fixed set of resamples.
    Cost: O(2048 * rows) per head.   Guarantee: for two-valued errors it is the Clopper-Pearson interval, never below 95%;
    in general its coverage is conjectured there and tested here. Assumes that no row is worse than max(cap, worst
    row seen). Rows may come one from each of equal strata: that only concentrates the sample.

    If no sampled row is wrong, the high end exceeds the mean by about 3.7 / rows, because the sample cannot exclude wrong
    rows elsewhere.

    Args:
        errors: one error per row, not negative.
        live: which rows count.
        cap: the largest error that is assumed for an unsampled row.

    Returns:
        low and high ends; NaN if no row counts.
    """
    rows, device = errors.shape[-1], errors.device
    weight = _exponentials(rows + 1, device)
    shown = errors.double().masked_fill(~live[:, None], 0.0)
    worst = shown.amax(-1).clamp(min=cap)
    spare = weight[:, -1, None, None]  # the row more
    total = (weight[:, :-1] @ live.double().T)[..., None] + spare  # [resamples, batch, 1]
    seen = (shown.flatten(0, 1) @ weight[:, :-1].T).T.unflatten(1, shown.shape[:2])  # [resamples, batch, heads]
    tail = math.ceil(_RESAMPLES * (1 - _LEVEL) / 2)
    low = torch.kthvalue(seen / total, tail, dim=0).values
    high = torch.kthvalue((seen + spare * worst) / total, _RESAMPLES + 1 - tail, dim=0).values
    none = ~live.any(-1, keepdim=True)
    low, high = (end.masked_fill(none, torch.nan).to(errors.dtype) for end in (low, high))
    return low, high


def format_mean(mean: float, low: float, high: float, rows: int) -> str:
    """Print a mean error with its interval, or without one if it would say little.

    Args:
        mean: the mean.
        low: low end of the interval; equal to the high end if no row is outside the sample.
        high: high end.
        rows: number of sampled rows.

    Returns:
        the numbers.
    """
    return f"{mean:.2g}" if rows < _LEAST_ROWS and low < high else f"{mean:.2g} (95% CI {low:.2g}-{high:.2g})"


def format_lack(low: float, high: float, rows: int) -> str:
    """Say why a mean is printed without an interval.

    Args:
        low: low end of the interval.
        high: high end.
        rows: number of sampled rows.

    Returns:
        the reason, to be put behind the number of rows; empty if `format_mean` prints the interval.
    """
    return f" (too few for an interval: at least {_LEAST_ROWS})" if rows < _LEAST_ROWS and low < high else ""


def _exponentials(count: int, device: torch.device) -> Float[Tensor, "resamples count"]:
    """Draw standard exponentials: divided by their sum they are uniform on the simplex, and so is any subset by its sum."""
    column = torch.arange(count, dtype=torch.int64, device=device)
    if triton_reads(torch.empty(1, 1, dtype=torch.float32, device=device)):
        # one launch in place of some eighty
        places = uniform_of_tiles(None, column, 1, _RESAMPLES // 2, int(hash_state((_STREAM,))), -1)
    else:
        row = torch.arange(_RESAMPLES // 2, dtype=torch.int64, device=device)
        places = uniform((_STREAM, row[:, None], column), device)
    # midpoints of the steps of the hash: never 0 or 1
    places = places + 2.0**-33
    return -torch.cat([places, 1 - places]).log_()


def percentile_bound(
    errors: Float[Tensor, "batch heads rows"], live: Bool[Tensor, "batch rows"], percentile: float = 0.95
) -> Float[Tensor, "batch heads"]:
    """Bound a percentile of the row errors from above by one of the sampled errors, for any distribution.

    The k-th smallest of m errors is at or above the p-quantile unless k or more of them are below it. So the bound is the
    error of the smallest rank k with P(Binomial(m, p) <= k - 1) >= 95%. For p = 0.95 at least m = 59 rows are needed, and
    the largest of the 59 errors is the bound (0.95^59 = 0.048).
    Guarantee: 95% confidence, distribution-free; rows drawn one from each of equal strata only raise it (Hoeffding, 1956).

    Args:
        errors: one error per row.
        live: which rows count.
        percentile: the percentile to bound, as a fraction.

    Returns:
        the bound; NaN if too few rows count.
    """
    rank = _bound_rank(live, percentile)[:, None, None].expand(-1, errors.shape[1], 1)
    ordered = errors.masked_fill(~live[:, None], torch.inf).sort(-1).values
    bound = ordered.gather(-1, (rank - 1).clamp(min=0)).squeeze(-1)
    return bound.masked_fill(rank.squeeze(-1) == 0, torch.nan)


def _bound_rank(live: Bool[Tensor, "batch rows"], percentile: float) -> Int[Tensor, " batch"]:
    # ranks of every possible count: the host does not wait for the device to tell one
    ranks = torch.tensor(_least_ranks(live.shape[1], percentile), dtype=torch.int64, device=live.device)
    return ranks[live.sum(-1)]


@lru_cache(maxsize=16)
def _least_ranks(most: int, percentile: float) -> tuple[int, ...]:
    """Find the least k with P(Binomial(count, percentile) >= k) <= 5%, or 0, for every count up to `most`."""

    def chance(count: int, successes: int) -> float:
        log_ways = math.lgamma(count + 1) - math.lgamma(successes + 1) - math.lgamma(count - successes + 1)
        return math.exp(log_ways + successes * math.log(percentile) + (count - successes) * math.log1p(-percentile))

    # one trial more adds p times the chance of one success less; no rank: one more than trials, which has no chance
    ranks, rank, above = [0], 1, 0.0
    for count in range(1, most + 1):
        above += percentile * chance(count - 1, rank - 1)
        if above > 1 - _LEVEL:
            above, rank = above - chance(count, rank), rank + 1
        ranks.append(rank if rank <= count else 0)
    return tuple(ranks)
