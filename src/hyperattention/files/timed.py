"""Times of a plan and of exact attention at several lengths: the crossover, and its reliability."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timed:
    """Times at one length, of all the plan's layers together: plan and exact attention ran alternately, for several rounds.

    Args:
        length: tokens.
        plan: seconds of the plan, the median over the rounds in each layer.
        exact: the same for exact attention.
        lowest: smallest speedup of the plan over exact attention in any round.
        highest: largest speedup in any round.
    """

    length: int
    plan: float
    exact: float
    lowest: float
    highest: float

    @property
    def ratio(self) -> float:
        """Speedup of the plan over exact attention, by the medians; the crossover depends on it."""
        return self.exact / self.plan


@dataclass(frozen=True)
class Crossing:
    """The number of keys from which a plan is faster than exact attention.

    Args:
        times: times by ascending length; the last length is that of the text.
    """

    times: tuple[Timed, ...]

    @property
    def keys(self) -> int | None:
        """The shortest length from which the plan was always faster; None if it was slower at the longest length."""
        return self._first([each.ratio for each in self.times])

    @property
    def sure(self) -> bool:
        """Whether the rounds agree: the worst and the best round of each length give the same crossover."""
        return self.earliest == self.latest

    @property
    def earliest(self) -> int | None:
        """The crossover by the plan's best rounds."""
        return self._first([max(each.highest, each.ratio) for each in self.times])

    @property
    def latest(self) -> int | None:
        """The crossover by the plan's worst rounds."""
        return self._first([min(each.lowest, each.ratio) for each in self.times])

    def _first(self, ratios: list[float]) -> int | None:
        pays = None
        for each, ratio in zip(reversed(self.times), reversed(ratios), strict=True):
            if ratio <= 1:
                break
            pays = each.length
        return pays

    def describe(self) -> list[str]:
        """Describe the times, with a warning if the rounds disagree.

        Returns:
            one or two sentences; none if no length was timed.
        """
        if not self.times:
            return []
        last = self.times[-1]
        found = (
            f"At {last.length:,} tokens its attention took {last.plan:.3g} s and exact attention {last.exact:.3g} s "
            f"({last.ratio:.2f}x as fast; {last.lowest:.2f}x to {last.highest:.2f}x over the rounds)"
        )
        if self.sure:
            return [f"{found}."]
        best, worst = (_in_words(keys) for keys in (self.earliest, self.latest))
        return [
            f"{found}.",
            f"WARNING: the rounds disagree on where the plan is faster: {best} by its best rounds, {worst} by its worst. "
            "Other work on this machine may have affected them: time the plan again with `hyperattention retime` when it "
            "is idle.",
        ]


def _in_words(keys: int | None) -> str:
    return "nowhere" if keys is None else f"from {keys:,} keys on"
