"""Rankings of methods, with tests whether the differences between neighbours are larger than the noise."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_NORMAL = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Step:
    """The difference between one method and the next worse method.

    Args:
        better: the method with the smaller mean.
        worse: the next method.
        difference: the mean of `worse` minus the mean of `better`.
        low: lower end of the 95% interval of that difference; None for a single piece, which gives no estimate of noise.
        high: upper end of the interval, or None.
    """

    better: str
    worse: str
    difference: float
    low: float | None
    high: float | None

    @property
    def told_apart(self) -> bool:
        """Whether the difference is larger than the noise."""
        return self.low is not None and self.low > 0


def rank(values: Mapping[str, Sequence[float]]) -> tuple[Step, ...]:
    """Order methods by their mean, and compare each method with the next, piece by piece.

    d = mean_i (b_i - a_i),  interval d -+ t s / sqrt(n)
    The difficulty of a piece that is common to both methods cancels, so a difference can be larger than the noise although
    the intervals of the two methods overlap. The interval assumes independent pieces and normal differences.

    Args:
        values: for each method, the error or loss on each piece of the inputs; the pieces are the same for all methods.

    Returns:
        a step for each pair of neighbours; with a single piece, no difference is larger than the noise.

    Raises:
        ValueError: if methods were measured on different numbers of pieces.
    """
    if len({len(each) for each in values.values()}) > 1:
        counts = {name: len(each) for name, each in values.items()}
        raise ValueError(f"pieces measured: {counts}: compare methods on the same pieces")
    order = sorted(values, key=lambda name: statistics.fmean(values[name]))
    return tuple(_step(better, worse, values) for better, worse in pairwise(order))


def _step(better: str, worse: str, values: Mapping[str, Sequence[float]]) -> Step:
    differences = [b - a for a, b in zip(values[better], values[worse], strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Step(better, worse, mean, None, None)
    half = _student(count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return Step(better, worse, mean, mean - half, mean + half)


def _student(freedom: int) -> float:
    """Approximate the 97.5% point of Student's t (Abramowitz and Stegun, 1964, 26.7.5), within 1% for `freedom` >= 3."""
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def not_told_apart(steps: Sequence[Step]) -> tuple[tuple[str, ...], ...]:
    """Group neighbours whose difference may be noise.

    Args:
        steps: the steps of a ranking, in order.

    Returns:
        chains of two or more methods, better methods first; each method may equal its neighbour, but not necessarily all
        methods of the chain.
    """
    chains: list[list[str]] = []
    joined = False
    for step in steps:
        if step.told_apart:
            joined = False
            continue
        if not joined:
            chains.append([step.better])
        chains[-1].append(step.worse)
        joined = True
    return tuple(map(tuple, chains))
