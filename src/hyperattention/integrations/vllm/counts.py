"""Counts of what a process approximated: they are the metrics of Prometheus, and a line in the log."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hyperattention.integrations.vllm.split import Piece
from hyperattention.methods.base import AttentionMethod


@dataclass(frozen=True)
class ServedCounts:
    """Counts of attention calls, one for each layer, request and step: approximated, and exact by reason.

    Args:
        approximated: calls that ran the method.
        exact: calls that ran exact attention, by reason.
        listed_pairs: pairs of query and key that the method listed, in approximated calls.
        exact_pairs: pairs that exact attention would have scored there.
        audits: audited calls.
        error: mean relative error of the audited rows; NaN without an audit.
    """

    approximated: int
    exact: Mapping[str, int]
    listed_pairs: float
    exact_pairs: float
    audits: int
    error: float

    @property
    def share_of_pairs(self) -> float:
        """Pairs listed relative to exact attention's, in the approximated calls; 1 if there was none."""
        return self.listed_pairs / self.exact_pairs if self.exact_pairs else 1.0

    def __str__(self) -> str:
        """Format the counts in one line."""
        total = self.approximated + sum(self.exact.values())
        text = f"{self.approximated} of {total} attention calls approximated"
        if self.approximated:
            text += f", with {self.share_of_pairs:.3g} of their pairs"
        if self.exact:
            ordered = sorted(self.exact.items(), key=lambda item: -item[1])
            text += "; exact: " + ", ".join(f"{reason} ({num})" for reason, num in ordered)
        if self.audits:
            text += f"; mean relative error {self.error:.3g} in {self.audits} audited calls"
        return text


class ServedCounter:
    """Count the calls of one process; read them through `counts`."""

    def __init__(self) -> None:
        """Make a counter without calls."""
        self._exact: Counter[str] = Counter()
        self.approximated, self.audits = 0, 0
        self._listed, self._pairs, self._error = 0.0, 0.0, 0.0

    def approximate(self, pairs: tuple[float, float]) -> None:
        """Count an approximated call.

        Args:
            pairs: pairs listed, and those of exact attention.
        """
        self.approximated += 1
        self._listed += pairs[0]
        self._pairs += pairs[1]

    def exactly(self, reason: str, calls: int = 1) -> None:
        """Count exact calls.

        Args:
            reason: the reason.
            calls: number of calls.
        """
        self._exact[reason] += calls

    def audit(self, error: float) -> None:
        """Count an audited call.

        Args:
            error: its mean relative error.
        """
        self.audits += 1
        self._error += error

    @property
    def counts(self) -> ServedCounts:
        """Return a snapshot of the counts."""
        error = self._error / self.audits if self.audits else float("nan")
        exact = MappingProxyType({reason: num for reason, num in self._exact.items() if num})
        return ServedCounts(self.approximated, exact, self._listed, self._pairs, self.audits, error)


def pairs_of(method: AttentionMethod, piece: Piece, head_dim: int) -> tuple[float, float]:
    """Count the pairs of one head in a piece.

    Args:
        method: the method.
        piece: the queries.
        head_dim: width of a head.

    Returns:
        pairs that the method lists (no more than a query sees), and pairs of exact attention.
    """
    slots, first = method.cost(piece.keys, head_dim=head_dim).pairs, piece.keys - piece.count + 1
    exact = (first + piece.keys) * piece.count / 2
    # queries at the beginning see fewer keys than the method would list
    few = min(piece.count, max(0, int(slots) + 1 - first))
    listed = (first + first + few - 1) * few / 2 + slots * (piece.count - few)
    return min(listed, exact), exact
