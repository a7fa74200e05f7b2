"""The mean error over the audits of several calls, with a 95% interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hyperattention.error.audit import ErrorReport


@dataclass(frozen=True)
class Error:
    """A mean relative error with its 95% interval.

    Args:
        mean: mean over calls, heads and sampled rows.
        low: lower end of the interval.
        high: upper end of the interval.
        rows: number of rows sampled for each head in each call.
        calls: number of audited calls.
    """

    mean: float
    low: float
    high: float
    rows: int
    calls: int


def pool(reports: Sequence[ErrorReport]) -> Error | None:
    """Average the audits of several calls, whose rows were drawn with different seeds.

    mean = sum_c e_c / C;  low = mean - sqrt(sum_c (e_c - low_c)^2) / C;  high = mean + sqrt(sum_c (high_c - e_c)^2) / C
    Heads of one call share their rows, so their half-widths are averaged. Calls are independent, so the squares of their
    half-widths are added.

    Args:
        reports: one audit for each call.

    Returns:
        the mean with its interval; None without audits.
    """
    if not reports:
        return None
    calls = [[float(x.double().mean()) for x in (report.relative_error, *report.interval)] for report in reports]
    count = len(calls)
    mean = sum(middle for middle, _, _ in calls) / count
    below = math.sqrt(sum((middle - low) ** 2 for middle, low, _ in calls)) / count
    above = math.sqrt(sum((high - middle) ** 2 for middle, _, high in calls)) / count
    return Error(mean, max(0.0, mean - below), mean + above, reports[0].num_rows, count)
