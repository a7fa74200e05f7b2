"""Which differences between methods exceed the noise: neighbours compared on what both were measured on."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_NORMAL = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Step:
    """From one method to the next worse one.

    Args:
        better: the method with the smaller mean.
        worse: the next.
        difference: how much larger its mean is.
        low: low end of the 95% interval of that difference; None where a single piece tells nothing of noise.
        high: high end, or None.
    """

    better: str
    worse: str
    difference: float
    low: float | None
    high: float | None

    @property
    def told_apart(self) -> bool:
        """Whether the difference exceeds the noise."""
        return self.low is not None and self.low > 0


def rank(values: Mapping[str, Sequence[float]]) -> tuple[Step, ...]:
    """Order methods by their mean, and compare each with the next, value by value.

    d = mean_i (b_i - a_i),  interval d -+ t s / sqrt(n): what makes a piece of the inputs hard for both methods cancels, so
    methods whose own intervals overlap may well be told apart. Takes pieces as independent and differences as normal.

    Args:
        values: for each method the error, or loss, on each piece of the inputs; the pieces are the same for all.

    Returns:
        a step for each two neighbours; with a single piece nothing is told apart.

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
    """Approximate the 97.5% point of Student's t (Abramowitz and Stegun, 1964, 26.7.5), to 1% from 3 on."""
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def not_told_apart(steps: Sequence[Step]) -> tuple[tuple[str, ...], ...]:
    """Join neighbours whose difference may be noise.

    Args:
        steps: in order.

    Returns:
        chains of two methods or more, the better ones first; each may equal the next, not every other.
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
