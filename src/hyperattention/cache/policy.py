"""The base class of every policy, which chooses the keys to keep of a full cache, and its input."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.cache.slots import CacheSlots


@dataclass(frozen=True)
class CompressionRequest:
    """A full cache: the input of a policy.

    Args:
        held: all slots: sinks, then candidates in the order of their positions, then the recent window.
        begin: index of the first candidate; the sinks before it are always kept.
        end: end of the candidates; the window from there on is always kept.
        num: number of slots to keep of the candidates, fewer than there are candidates.
        queries: the latest queries: at most as many as the policy asks for.
        scale: factor of the scores.
        counters: seed, layer and number of this compression, which determine every draw.
        rule: the model's softcap and learned sinks.
    """

    held: CacheSlots
    begin: int
    end: int
    num: int
    queries: Float[Tensor, "batch heads queries head_dim"]
    scale: float
    counters: tuple[int, int, int]
    rule: ScoreRule = PLAIN

    @property
    def candidates(self) -> CacheSlots:
        """Return the slots from which the policy chooses."""
        return self.held.part(self.begin, self.end)


class Policy(ABC):
    """A rule for which keys between sinks and window to keep.

    Laws, tested for every policy: exactly `num` slots are returned; an empty slot is returned only if there are too few
    keys, and it stays empty; the same counters give the same bits; batch rows and heads do not affect each other. A policy
    with `weighted` True keeps the expected value of every sum over the keys; other policies drop keys, and document which.
    """

    @property
    def num_queries(self) -> int:
        """Number of latest queries that the policy reads; 0 if keys and values suffice."""
        return 0

    @property
    def watches(self) -> bool:
        """Whether the policy reads `CacheSlots.score`: the attention that each key got, summed over the queries."""
        return False

    @property
    @abstractmethod
    def weighted(self) -> bool:
        """Whether the kept keys have weights that represent the dropped keys."""

    @abstractmethod
    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Choose the keys to keep.

        Args:
            full: the cache.

        Returns:
            `full.num` slots in place of the candidates, in the order of their positions.
        """
