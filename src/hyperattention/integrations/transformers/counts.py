"""How many attention calls of a model were approximated, and why the others were not."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class CallCounts:
    """Attention calls so far, one a layer and forward pass, approximated or exact by reason: what ran is visible.

    Args:
        approximated: calls that ran the method.
        exact: calls that ran exact attention, by reason.

    Example:
        >>> print(CallCounts(approximated=3, exact={"single query": 1}))
        3 of 4 attention calls approximated (75%); exact: single query 1
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
        """Give the share of calls that ran the method.

        Returns:
            a number in [0, 1]; 0 where there was no call.
        """
        return self.approximated / self.total if self.total else 0.0

    def __str__(self) -> str:
        """Say it in one line, the commonest reason first."""
        counted = f"{self.approximated} of {self.total} attention calls approximated ({self.share_approximated:.0%})"
        reasons = ", ".join(f"{reason} {num}" for reason, num in sorted(self.exact.items(), key=lambda item: -item[1]))
        return f"{counted}; exact: {reasons}" if reasons else counted


class CallCounter:
    """Count the attention calls of one `use`; read it at any time through `counts`."""

    def __init__(self) -> None:
        """Start from nothing."""
        self._calls: Counter[str | None] = Counter()

    def record(self, reason: str | None) -> None:
        """Count one call.

        Args:
            reason: why it was exact; None where it was approximated.
        """
        self._calls[reason] += 1

    @property
    def counts(self) -> CallCounts:
        """Take a snapshot, which later calls do not change.

        Returns:
            the calls so far.
        """
        exact = {reason: num for reason, num in self._calls.items() if reason is not None}
        return CallCounts(self._calls[None], MappingProxyType(exact))

    def __str__(self) -> str:
        """Say what ran so far in one line."""
        return str(self.counts)
