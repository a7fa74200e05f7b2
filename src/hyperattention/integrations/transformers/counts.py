"""Counts of a model's attention calls: approximated, or exact with the reason."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class CallCounts:
    """Counts of attention calls, one for each layer and forward pass: approximated, and exact by reason.

    Args:
        approximated: calls that ran the method.
        exact: calls that ran exact attention, by reason.

    Example:
        >>> print(CallCounts(approximated=3, exact={"single query": 1}))
        3 of 4 attention calls approximated (75%); exact: single query (1 call)
    """

    approximated: int
    exact: Mapping[str, int]

    @property
    def total(self) -> int:
        """Count all calls.

        Returns:
            approximated and exact calls together.
        """
        return self.approximated + sum(self.exact.values())

    @property
    def share_approximated(self) -> float:
        """Compute the share of calls that ran the method.

        Returns:
            a number in [0, 1]; 0 if there was no call.
        """
        return self.approximated / self.total if self.total else 0.0

    def __str__(self) -> str:
        """Format the counts in one line, the most frequent reason first."""
        counted = f"{self.approximated} of {self.total} attention calls approximated ({self.share_approximated:.0%})"
        ordered = sorted(self.exact.items(), key=lambda item: -item[1])
        reasons = ", ".join(f"{reason} ({num} {'call' if num == 1 else 'calls'})" for reason, num in ordered)
        return f"{counted}; exact: {reasons}" if reasons else counted


class CallCounter:
    """Count the attention calls of one `use`; read it at any time through `counts`."""

    def __init__(self) -> None:
        """Make a counter without calls."""
        self._calls: Counter[str | None] = Counter()

    def record(self, reason: str | None) -> None:
        """Count one call.

        Args:
            reason: the reason for exact attention; None if the call was approximated.
        """
        self._calls[reason] += 1

    @property
    def counts(self) -> CallCounts:
        """Return a snapshot of the counts; later calls do not change it.

        Returns:
            the counts so far.
        """
        exact = {reason: num for reason, num in self._calls.items() if reason is not None}
        return CallCounts(self._calls[None], MappingProxyType(exact))

    def __str__(self) -> str:
        """Format the counts so far in one line."""
        return str(self.counts)
