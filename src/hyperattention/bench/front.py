"""The Pareto front of time and error, and errors at equal time."""

import math
from collections.abc import Sequence
from itertools import pairwise

# seconds and error
Spot = tuple[float, float]


def on_front(spots: Sequence[Spot]) -> tuple[bool, ...]:
    """Return which spots are on the Pareto front: no other spot is at least as good in both values and better in one.

    Args:
        spots: time and error of each method; NaN is worse than every number.

    Returns:
        one boolean for each spot; equal spots get the same result.
    """
    known = [tuple(math.inf if math.isnan(value) else value for value in spot) for spot in spots]
    return tuple(not any(_beats(other, spot) for other in known) for spot in known)


def _beats(other: tuple[float, ...], spot: tuple[float, ...]) -> bool:
    return other != spot and all(a <= b for a, b in zip(other, spot, strict=True))


def error_at(seconds: float, curve: Sequence[Spot]) -> float | None:
    """Interpolate a method's error at a given time, from its times and errors at several budgets.

    Between two budgets, log(error) is linear in log(time). After the last budget, the extrapolation uses the mean slope
    from the first to the last budget, because noise in single times changes this slope little. A budget with both a longer
    time and a larger error than another budget is left out.

    Args:
        seconds: the available time.
        curve: time and error at each budget, in any order.

    Returns:
        the error; None if the smallest budget takes longer.
    """
    best: list[Spot] = []
    for spot in sorted(curve):
        if not best or spot[1] < best[-1][1]:
            best.append(spot)
    if not best or seconds < best[0][0]:
        return None
    for (t0, e0), (t1, e1) in pairwise(best):
        if t0 <= seconds < t1:
            # an error of 0 has no logarithm, so it is reached only at the time of its own budget
            share = math.log(seconds / t0) / math.log(t1 / t0)
            return e0 * (e1 / e0) ** share if e1 > 0 else e0
    (t0, e0), (t1, e1) = best[0], best[-1]
    return e1 * (e1 / e0) ** (math.log(seconds / t1) / math.log(t1 / t0)) if t1 > t0 and e1 > 0 else e1
