"""Keep the keys that the latest queries attend to, and their neighbours: the end of a prompt often holds the question."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from hyperattention.cache.attended import attended
from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.check import positive
from hyperattention.policies.choose import keep_best


@dataclass(frozen=True)
class LastWindow(Policy):
    """Keep the keys with the most attention from the last queries, smoothed over neighbours, with unchanged weights.

    s_j = pool_{|i - j| <= kernel / 2} sum_{last queries} softmax_i(scale q . k_i)

    Neighbours are kept because an answer has more tokens than the one that got attention.

    Source: Li et al., 2024 (arXiv:2404.14469), SnapKV.   Differs: decoded tokens are compressed as well as the prompt, each
    time by the latest queries of that moment; query heads that share a kv head are summed.
    Cost: the scores of `num_queries` queries per compression.
    Guarantee: none; dropped keys are lost, also those that a later question needs.

    Args:
        num_queries: number of last queries whose attention counts.
        kernel: number of slots that are pooled, odd.
        average: whether to pool by the mean in place of the maximum.

    Raises:
        ValueError: if a number is not positive, or the kernel is even.
    """

    num_queries: int = 32
    kernel: int = 5
    average: bool = True

    def __post_init__(self) -> None:
        positive("LastWindow", num_queries=self.num_queries, kernel=self.kernel)
        if self.kernel % 2 == 0:
            raise ValueError(f"LastWindow(kernel={self.kernel}): pooling around a slot needs an odd number of slots")

    @property
    def weighted(self) -> bool:
        """False: dropped keys are lost."""
        return False

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Keep the keys that the last queries attend to."""
        score = attended(full.held, full.queries, full.scale, full.rule)[:, :, full.begin : full.end]
        return keep_best(self._pooled(score, full.candidates.live), full)

    def _pooled(self, score: Tensor, live: Tensor) -> Tensor:
        half = self.kernel // 2
        if not self.average:
            return max_pool1d(score, self.kernel, 1, half)
        # the mean over slots that hold a key: slots at an edge have fewer neighbours
        total, count = (avg_pool1d(x, self.kernel, 1, half) for x in (score, live.to(score.dtype)))
        return total / count.clamp(min=1.0 / self.kernel)
