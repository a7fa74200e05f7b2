"""The model of what context parallelism moves, and of the time that it takes on a wire.

The model, for one kv head of width d, R ranks with one chunk of n / R tokens each, M slots a pool, A averages a chunk, H
keys before a chunk, b bytes a number. The busiest rank is the first or the second one. Through them go, besides 16 bytes for
the seal of every message,

    first, received:   (R - 1) (A (d + 4 + 4) + 48 + 832)                      averages, their totals, replies, headers
    first, sent:       S (2 d b + 4) + H 2 d b + (R - 1) (4 A + 1248 + 832)   drawn keys, the halo, sums, counts, headers
    second, received:  the first line for R - 2, a header, and (M + H) 2 d b + 4 M + 4 A + 1248     also a pool and the halo

where S is how many keys it gives to all pools. If all pools took keys from everywhere alike, S were M (1 + 1/2 + ... +
1/(R - 1)); at worst S = M (R - 1). Ring attention and an all-gather move (n - n / R) 2 d b.

Rounds follow one another, so each takes the time of its own busiest rank:

    seconds = sum over rounds of  latency + message * messages + max(busiest / link, all / shared)

The link is what one rank sends, or receives, in a second; `shared` is what all ranks together move, if they share cores or a
bus. `distributed_check.py` fits latency and bandwidth to rounds of plain patterns, and
predicts the ways from them. Arithmetic, which can
hide a ring's time, is left out, and so is what the host plans.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from distributed import HEAD_DIM

from hyperattention.distributed.seal import SIZE

HEADER, COUNTS, REPLY = 832 + SIZE, 1248 + SIZE, 48 + SIZE


@dataclass(frozen=True)
class Round:
    """One exchange of all ranks.

    Args:
        purpose: what moves.
        busiest: bytes that the busiest rank sends, or receives.
        everyone: bytes that all ranks send together.
        messages: messages with content that the busiest rank sends, or receives.
        both_ways: whether two ranks send to each other.
    """

    purpose: str
    busiest: float
    everyone: float
    messages: int
    both_ways: bool = False


@dataclass(frozen=True)
class Wire:
    """A network. The default is assumed, for GPUs; `fitted` measures one.

    Args:
        latency: seconds of a round.
        message: seconds more for every message of a rank.
        link: bytes a second that a rank sends, and at the same time receives.
        both_ways: the same where two ranks send to each other; the TCP connection of a pair of ranks halves it.
        shared: bytes a second of all ranks together.
    """

    latency: float = 20e-6
    message: float = 1e-6
    link: float = 50e9
    both_ways: float = 50e9
    shared: float = math.inf

    def seconds(self, rounds: Iterable[Round]) -> float:
        return sum(
            self.latency
            + self.message * each.messages
            + max(each.busiest / (self.both_ways if each.both_ways else self.link), each.everyone / self.shared)
            for each in rounds
        )


@dataclass(frozen=True)
class Case:
    """One call, for one kv head."""

    tokens: int
    ranks: int
    num: int = 2048
    averages: int = 2048
    halo: int = 256
    head_dim: int = HEAD_DIM
    bytes_each: int = 2

    @property
    def key(self) -> int:
        """Bytes of a key and its value."""
        return 2 * self.head_dim * self.bytes_each

    def rounds(self, given: float) -> list[Round]:
        """List the rounds of `PooledChunks` if the first rank gives so many keys to pools."""
        others, pairs = self.ranks - 1, self.ranks * (self.ranks - 1) // 2
        # the first rank has something of every later chunk; the last one asks all earlier ranks
        of_pairs = {"averages": self.asked, "sums": self.number, "totals": self.number, "counts": COUNTS, "replies": REPLY}
        # each rank gives to all later ones, and gets a whole pool
        listed, most = others * self.num, max(given, self.num)
        halo = self.halo * self.key + SIZE
        return [
            Round("headers", others * HEADER, 2 * pairs * HEADER, others, both_ways=True),
            Round("near", halo, others * halo, 1),
            *(Round(name, others * size, pairs * size, others) for name, size in of_pairs.items()),
            Round("weights", 4 * most + others * SIZE, 4 * listed + pairs * SIZE, others),
            Round("pool", most * self.key + others * SIZE, listed * self.key + pairs * SIZE, others),
        ]

    @property
    def asked(self) -> int:
        """Bytes of the averages of a chunk."""
        return self.averages * (self.head_dim + 4) + SIZE

    @property
    def number(self) -> int:
        """Bytes of one number for each average of a chunk."""
        return 4 * self.averages + SIZE

    @property
    def ring(self) -> list[Round]:
        """List the rounds of ring attention; two ranks send to each other."""
        size = self.tokens // self.ranks * self.key
        return [Round("ring", size, self.ranks * size, 1, both_ways=self.ranks == 2)] * (self.ranks - 1)

    @property
    def gather(self) -> list[Round]:
        """List the single round of an all-gather."""
        size = self.tokens // self.ranks * self.key * (self.ranks - 1)
        return [Round("near", size, self.ranks * size, self.ranks - 1, both_ways=True)]

    @property
    def received(self) -> int:
        """Bytes that the first rank receives."""
        return (self.ranks - 1) * (self.asked + self.number + REPLY + HEADER)

    def sent(self, given: float) -> float:
        """Bytes that the first rank sends, if it gives so many keys to pools."""
        each = self.number + COUNTS + HEADER + 2 * SIZE
        return given * (self.key + 4) + self.halo * self.key + SIZE + (self.ranks - 1) * each

    def given(self, pool_bytes: int) -> int:
        """Tell how many keys so many bytes are; the seals of a few messages are shorter than a key."""
        return pool_bytes // self.key

    @property
    def alike(self) -> float:
        """Keys that the first rank gives if pools take keys from everywhere alike."""
        return self.num * sum(1 / chunk for chunk in range(1, self.ranks))

    @property
    def worst(self) -> float:
        """Keys that the first rank gives if every pool takes its keys from there alone."""
        return self.num * (self.ranks - 1)

    @property
    def moved_by_ring(self) -> float:
        """Bytes that ring attention, or an all-gather, moves through each rank."""
        return (self.tokens - self.tokens / self.ranks) * self.key

    def most(self, given: float) -> float:
        """Bytes through the busiest rank, sent or received, whichever are more."""
        # of the keys of its own pool, and of the halo
        own = (self.num + self.halo) * self.key + 4 * self.num + 3 * SIZE
        second = replace(self, ranks=self.ranks - 1).received + HEADER + own + self.number + COUNTS
        return max(self.received, self.sent(given), second)
