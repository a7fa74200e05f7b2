"""Time several calls alternately, so that a slow phase of the machine affects all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]


def ignore(name: str) -> None:
    """Do nothing; the default callback for progress."""


def quartiles(values: tuple[float, ...]) -> tuple[float, float]:
    """Compute the lower and upper quartile, with interpolation; for a single value, both are that value."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


@dataclass(frozen=True)
class Timing:
    """The times of one call over the rounds.

    Args:
        seconds: one time for each round, in order.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and upper quartile of the seconds."""
        return quartiles(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """The ratio of the speeds of two calls.

    Args:
        value: median of the ratios within a round, so that it lies between the quartiles.
        low: lower quartile of the ratios within a round.
        high: upper quartile of the ratios within a round.
    """

    value: float
    low: float
    high: float


def speedup(base: Timing, other: Timing) -> Ratio:
    """Divide the times of `base` by those of `other`, measured in the same rounds.

    Args:
        base: times of the reference call.
        other: times of the evaluated call.

    Returns:
        the median and the quartiles of the ratios of single rounds.
    """
    ratios = tuple(a / b for a, b in zip(base.seconds, other.seconds, strict=True))
    return Ratio(statistics.median(ratios), *quartiles(ratios))


def interleave(calls: Mapping[str, Call], repeats: int, on_call: Callable[[str], None] = ignore) -> dict[str, Timing]:
    """Time each call once in each round; each round starts with another call.

    The caller must warm up all calls first, because the first round counts.

    Args:
        calls: the calls to time, by name.
        repeats: number of rounds.
        on_call: called with the name of each call before it runs.

    Returns:
        the times of each call, by name.

    Raises:
        ValueError: if `repeats` is not positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: give at least 1")
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            on_call(name)
            began = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - began)
    return {name: Timing(tuple(spent)) for name, spent in seconds.items()}
