"""Keep the keys that were attended to most: what queries looked for so far, others may look for again."""

from dataclasses import dataclass

from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.policies.choose import keep_best


@dataclass(frozen=True)
class HeavyHitters(Policy):
    """Keep the keys with the most attention, summed over every query so far, with the weights that they have.

    a_j = sum_i softmax_j(scale q_i . k_j)

    Source: Zhang et al., 2023 (arXiv:2306.14048), H2O.   Differs: sinks are kept whatever they get; query heads that share
    a kv head are summed.
    Cost: watching costs the scores of every query over again: for a prompt as much as its attention, where nothing else
    needs them, and for a decoded token the scores of its slots.
    Guarantee: none; what is dropped is gone, and keys that came early had more queries to be seen by.
    """

    @property
    def watches(self) -> bool:
        """All queries vote."""
        return True

    @property
    def weighted(self) -> bool:
        """What is dropped is gone."""
        return False

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Keep what was attended to most."""
        return keep_best(full.candidates.score, full)
