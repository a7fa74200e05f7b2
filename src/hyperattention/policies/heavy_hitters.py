"""Keep the keys with the most attention so far: later queries may attend to the same keys."""

from dataclasses import dataclass

from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.policies.choose import keep_best


@dataclass(frozen=True)
class HeavyHitters(Policy):
    """Keep the keys with the most attention, summed over all queries so far, with unchanged weights.

    a_j = sum_i softmax_j(scale q_i . k_j)

    Source: Zhang et al., 2023 (arXiv:2306.14048), H2O.   Differs: attention sinks are always kept; query heads that share a
    kv head are summed.
    Cost: the scores of every query are computed a second time: for a prompt as many as its attention, for a decoded token
    the scores of its slots.
    Guarantee: none; dropped keys are lost, and early keys collect attention from more queries.
    """

    @property
    def watches(self) -> bool:
        """All queries vote."""
        return True

    @property
    def weighted(self) -> bool:
        """False: dropped keys are lost."""
        return False

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Keep the keys with the most attention."""
        return keep_best(full.candidates.score, full)
