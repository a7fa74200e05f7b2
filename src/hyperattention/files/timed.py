"""Times of a plan beside exact attention's at several lengths: from where it pays, and how sure that is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timed:
    """Times at one length, of all the plan's layers together: plan and exact attention ran in turn, several rounds.

    Args:
        length: tokens.
        plan: seconds of the plan, the median over the rounds in each layer.
        exact: the same of exact attention.
        lowest: how many times as fast as exact attention the plan was in the round where it did worst.
        highest: the same of the round where it did best.
    """

    length: int
    plan: float
    exact: float
    lowest: float
    highest: float

    @property
    def ratio(self) -> float:
        """How many times as fast as exact attention the plan is, by the medians: what decides."""
        return self.exact / self.plan


@dataclass(frozen=True)
class Crossing:
    """From how many keys on a plan pays.

    Args:
        times: by ascending length; the last is that of the text.
    """

    times: tuple[Timed, ...]

    @property
    def keys(self) -> int | None:
        """The shortest length from which on the plan was always faster; None if it was not at the longest."""
        return self._first([each.ratio for each in self.times])

    @property
    def sure(self) -> bool:
        """Whether the rounds agree: the worst of them at each length gives the same answer as the best."""
        return self.earliest == self.latest

    @property
    def earliest(self) -> int | None:
        """The answer of the rounds where the plan did best."""
        return self._first([max(each.highest, each.ratio) for each in self.times])

    @property
    def latest(self) -> int | None:
        """The answer of the rounds where the plan did worst."""
        return self._first([min(each.lowest, each.ratio) for each in self.times])

    def _first(self, ratios: list[float]) -> int | None:
        pays = None
        for each, ratio in zip(reversed(self.times), reversed(ratios), strict=True):
            if ratio <= 1:
                break
            pays = each.length
        return pays

    def describe(self) -> list[str]:
        """Say what was measured and what follows, and warn where the rounds disagree.

        Returns:
            a sentence or two; none where nothing was timed.
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
            f"WARNING: the rounds disagree on where the plan pays: {best} by its best rounds, {worst} by its worst. "
            "Other work on this machine may have disturbed them: time the plan again with `hyperattention retime` when it "
            "is idle.",
        ]


def _in_words(keys: int | None) -> str:
    return "nowhere" if keys is None else f"from {keys:,} keys on"
