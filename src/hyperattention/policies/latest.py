"""Keep the latest keys and drop the rest: sinks and a window, the least that a cache can do."""

from dataclasses import dataclass

from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.policies.choose import keep_best


@dataclass(frozen=True)
class Latest(Policy):
    """Keep the latest keys, with weight one; with sinks this is streaming attention.

    Source: Xiao et al., 2023 (arXiv:2309.17453), StreamingLLM.   Differs: keys keep the positions they were read at.
    Cost: none.   Guarantee: none; what is older than the budget is gone.
    """

    @property
    def weighted(self) -> bool:
        """What is dropped is gone."""
        return False

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Keep the last candidates."""
        return keep_best(full.candidates.position.double(), full)
