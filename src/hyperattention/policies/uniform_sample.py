"""A uniform sample of all keys with equal weights: the baseline for every other policy."""

from dataclasses import dataclass

import torch

from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.policies.choose import best, keep_best, lottery


@dataclass(frozen=True)
class UniformSample(Policy):
    """Keep a uniform sample without replacement of all keys that were ever candidates, each of the same weight.

    w = keys / slots

    Every key gets one random number, and the keys with the smallest numbers are kept. So a sample of a sample is a sample of
    all keys.

    Source: reservoir sampling, as bottom-k (Cohen and Kaplan, 2007, "Summarizing data using bottom-k sketches"); as a
    control for caches Han et al., 2025 (arXiv:2502.07861).   Differs: nothing.
    Cost: a selection of the smallest of the candidates' numbers.
    Guarantee: numerator and denominator unbiased, because the choice does not depend on queries.
    """

    @property
    def weighted(self) -> bool:
        """True: the kept keys represent all keys."""
        return True

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Keep the keys with the smallest numbers."""
        old = full.candidates
        index = best(-lottery(full), full)
        # the total weight is the number of keys
        keys = old.log_weight.double().exp().sum(-1, keepdim=True)
        live = old.live.gather(2, index)
        count = live.sum(-1, keepdim=True).clamp(min=1)
        weight = (keys / count).clamp(min=1.0).log().expand(index.shape).masked_fill(~live, -torch.inf)
        return old.take(index, weight)


@dataclass(frozen=True)
class RandomKeys(Policy):
    """Keep a uniform sample with weight one: a baseline that shows the effect of the weights.

    Source: a baseline.   Differs: nothing.
    Cost: that of `UniformSample`.   Guarantee: none.
    """

    @property
    def weighted(self) -> bool:
        """False: dropped keys are lost."""
        return False

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Keep the keys with the smallest numbers, with unchanged weights."""
        return keep_best(-lottery(full), full)
