"""Counts of what a process approximated: they are the metrics of Prometheus, and a line in the log."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hyperattention.integrations.vllm.split import Piece
from hyperattention.methods.base import AttentionMethod
from hyperattention.random import hash_state

# first counter of the draws of audits, so that they share no bits with those of a method under one seed
_STREAM = 0x5E54ED


@dataclass(frozen=True)
class Approximated:
    """Counts of the approximated calls of one kind: of prompts, or of requests that generate.

    Args:
        calls: calls that were approximated.
        listed_pairs: pairs of query and key that were listed.
        exact_pairs: pairs that exact attention would have scored there.
        audits: audited calls.
        error: mean relative error of the audited rows; NaN without an audit.
    """

    calls: int
    listed_pairs: float
    exact_pairs: float
    audits: int
    error: float

    @property
    def share_of_pairs(self) -> float:
        """Pairs listed relative to exact attention's; 1 if there was no call."""
        return self.listed_pairs / self.exact_pairs if self.exact_pairs else 1.0

    @property
    def audited(self) -> str:
        """What the audits found, in words; empty without one."""
        return f"mean relative error {self.error:.3g} in {self.audits} audited calls" if self.audits else ""


@dataclass(frozen=True)
class ServedCounts:
    """Counts of attention calls, one for each layer, request and step: approximated, and exact by reason.

    Args:
        prompts: calls of prompts that ran the method.
        decoding: calls of requests that generate, over their best pages.
        exact: calls that ran exact attention, by reason.
    """

    prompts: Approximated
    decoding: Approximated
    exact: Mapping[str, int]

    def of(self, *, decoding: bool) -> Approximated:
        """Return the counts of one kind.

        Args:
            decoding: whether of requests that generate.

        Returns:
            the counts.
        """
        return self.decoding if decoding else self.prompts

    @property
    def approximated(self) -> int:
        """Approximated calls of both kinds."""
        return self.prompts.calls + self.decoding.calls

    def __str__(self) -> str:
        """Format the counts in one line."""
        total = self.approximated + sum(self.exact.values())
        text = f"{self.prompts.calls} of {total} attention calls approximated"
        if self.prompts.calls:
            text += f", with {self.prompts.share_of_pairs:.3g} of their pairs"
        if self.decoding.calls:
            share = self.decoding.share_of_pairs
            text += f"; {self.decoding.calls} calls decoded by their best pages, with {share:.3g} of their pairs"
        if self.exact:
            ordered = sorted(self.exact.items(), key=lambda item: -item[1])
            text += "; exact: " + ", ".join(f"{reason} ({num})" for reason, num in ordered)
        if self.prompts.audits:
            text += f"; {self.prompts.audited}"
        if self.decoding.audits:
            text += f"; decoding: {self.decoding.audited}"
        return text


class _Tally:
    """Sums of one kind of approximated calls."""

    def __init__(self) -> None:
        self.calls, self.audits, self.listed, self.pairs, self.error = 0, 0, 0.0, 0.0, 0.0

    @property
    def approximated(self) -> Approximated:
        error = self.error / self.audits if self.audits else float("nan")
        return Approximated(self.calls, self.listed, self.pairs, self.audits, error)


class ServedCounter:
    """Count the calls of one process; read them through `counts`."""

    def __init__(self) -> None:
        """Make a counter without calls."""
        self._exact: Counter[str] = Counter()
        self._prompts, self._decoding = _Tally(), _Tally()

    def approximate(self, pairs: tuple[float, float], *, decoding: bool = False) -> None:
        """Count an approximated call.

        Args:
            pairs: pairs listed, and those of exact attention.
            decoding: whether the request generates.
        """
        tally = self._decoding if decoding else self._prompts
        tally.calls += 1
        tally.listed += pairs[0]
        tally.pairs += pairs[1]

    def exactly(self, reason: str, calls: int = 1) -> None:
        """Count exact calls.

        Args:
            reason: the reason.
            calls: number of calls.
        """
        self._exact[reason] += calls

    def audit(self, error: float, *, decoding: bool = False) -> None:
        """Count an audited call.

        Args:
            error: its mean relative error.
            decoding: whether the request generates.
        """
        tally = self._decoding if decoding else self._prompts
        tally.audits += 1
        tally.error += error

    @property
    def counts(self) -> ServedCounts:
        """Return a snapshot of the counts."""
        exact = MappingProxyType({reason: num for reason, num in self._exact.items() if num})
        return ServedCounts(self._prompts.approximated, self._decoding.approximated, exact)


def is_audited(call: int, every: int, seed: int) -> bool:
    """Draw which calls are audited: one in each run of `every`, so that no layer is audited more often than another.

    Args:
        call: number of the call.
        every: length of a run; 0 for no audits.
        seed: seed of the draws.

    Returns:
        whether it is audited.
    """
    if not every:
        return False
    bits = hash_state((_STREAM, seed, call // every))
    assert isinstance(bits, int)  # of integers
    return bits * every >> 32 == call % every


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
