"""The contract of a policy: what is kept of a full cache, and what one is told to decide it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.cache.slots import CacheSlots


@dataclass(frozen=True)
class CompressionRequest:
    """A cache that is full, as a policy is shown it.

    Args:
        held: all slots: sinks, then candidates in the order of their positions, then the recent window.
        begin: first candidate; the sinks before it are kept whatever is decided.
        end: end of the candidates; the window from there on is kept as well.
        num: how many slots the candidates have to fit into, fewer than there are.
        queries: the latest queries, as many as the policy asks for and as there were.
        scale: factor of the scores.
        counters: seed, layer and number of this compression: what every draw is a function of.
        rule: what the model does to scores beside their scale.
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
        """Give the slots that the policy chooses from."""
        return self.held.part(self.begin, self.end)


class Policy(ABC):
    """What to keep of the keys between sinks and window.

    Laws, tested over every policy: exactly `num` slots come back; a slot that held nothing comes back only where too few
    are left, and still holds nothing; the same counters give the same bits; batch rows and heads do not see one another.
    A policy that says it is `weighted` keeps the expected total of every sum over the keys; another says what it drops.
    """

    @property
    def num_queries(self) -> int:
        """How many of the latest queries it wants to see; 0 if the keys and values tell all."""
        return 0

    @property
    def watches(self) -> bool:
        """Whether `Held.score` must be kept: the attention of every query, summed over the queries."""
        return False

    @property
    @abstractmethod
    def weighted(self) -> bool:
        """Whether what is kept stands for what was dropped."""

    @abstractmethod
    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Choose what stays.

        Args:
            full: the cache.

        Returns:
            `full.num` slots in place of the candidates, in the order of their positions.
        """
