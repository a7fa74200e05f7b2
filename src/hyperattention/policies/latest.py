"""Keep the latest keys and drop the rest: attention sinks and a window, the simplest policy."""

from dataclasses import dataclass

from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.policies.choose import keep_best


@dataclass(frozen=True)
class Latest(Policy):
    """Keep the latest keys, with weight one; with sinks this is streaming attention.

    Source: Xiao et al., 2023 (arXiv:2309.17453), StreamingLLM.   Differs: keys keep their original positions.
    Cost: none.   Guarantee: none; keys older than the budget are lost.
    """

    @property
    def weighted(self) -> bool:
        """False: dropped keys are lost."""
        return False

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Keep the last candidates."""
        return keep_best(full.candidates.position.double(), full)
