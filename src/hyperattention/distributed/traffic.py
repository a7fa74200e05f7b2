"""What a call sent and received, and what other ways of context parallelism would have."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Round:
    """Bytes of one exchange in which all ranks took part, as one of them saw it.

    Args:
        purpose: what moved.
        sent: bytes sent to each rank; 0 to itself.
        received: bytes received from each rank.
    """

    purpose: str
    sent: tuple[int, ...]
    received: tuple[int, ...]


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sent to others and received from others in the forward pass of one call.

    Args:
        sent: bytes sent, by what they are.
        received: bytes received, by what they are.
        rounds: exchanges in which all ranks took part.
        ring: bytes that ring attention would have sent, and received: keys and values of all other ranks. Derived.
    """

    sent: Mapping[str, int] = field(default_factory=dict)
    received: Mapping[str, int] = field(default_factory=dict)
    rounds: int = 0
    ring: int = 0

    @classmethod
    def of(cls, rounds: Iterable[Round], ring: int) -> "Traffic":
        """Add up rounds.

        Args:
            rounds: the exchanges of a call.
            ring: bytes that ring attention would have moved.

        Returns:
            the traffic.
        """
        sent: Counter[str] = Counter()
        received: Counter[str] = Counter()
        count = 0
        for each in rounds:
            sent[each.purpose] += sum(each.sent)
            received[each.purpose] += sum(each.received)
            count += 1
        return cls(dict(sent), dict(received), count, ring)

    @property
    def most(self) -> int:
        """The larger of all bytes sent and all bytes received."""
        return max(sum(self.sent.values()), sum(self.received.values()))

    @property
    def times_fewer(self) -> float:
        """How many times fewer bytes than ring attention, or an all-gather, moves through this rank; derived."""
        return self.ring / max(1, self.most)

    def __str__(self) -> str:
        purposes = dict.fromkeys([*self.sent, *self.received])
        rows = [f"  {name}: {self.sent.get(name, 0)} sent, {self.received.get(name, 0)} received" for name in purposes]
        head = f"{self.most} bytes in {self.rounds} exchanges, {self.times_fewer:.1f} times fewer than ring attention"
        return "\n".join([head, *rows])


@dataclass(frozen=True)
class DistributedResult:
    """The output of one call for the tokens of this rank.

    Args:
        out: the output, in the dtype of the query.
        lse: log-sum-exp of every row; -inf if a row sees no key.
        traffic: what this rank sent and received.
    """

    out: Float[Tensor, "batch heads queries value_dim"]
    lse: Float[Tensor, "batch heads queries"]
    traffic: Traffic
