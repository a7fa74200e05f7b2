"""A uniform sample of all keys, each standing for as many: the control that every other policy has to beat."""

from dataclasses import dataclass

import torch

from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.policies.choose import best, keep_best, lottery


@dataclass(frozen=True)
class UniformSample(Policy):
    """Keep a uniform sample without replacement of all keys that were ever candidates, each of the same weight.

    w = keys / slots

    Every key draws a number once; those with the smallest stay. So a sample of a sample is a sample of the whole.

    Source: reservoir sampling, as bottom-k (Cohen and Kaplan, 2007, "Summarizing data using bottom-k sketches"); as a
    control for caches Han et al., 2025 (arXiv:2502.07861).   Differs: nothing.
    Cost: a selection of the smallest of the candidates' numbers.
    Guarantee: numerator and denominator unbiased for keys that no query chose.
    """

    @property
    def weighted(self) -> bool:
        """What is kept stands for all."""
        return True

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Keep the smallest numbers."""
        old = full.candidates
        index = best(-lottery(full), full)
        # weights are sums of equal ones, so their total counts the keys
        keys = old.log_weight.double().exp().sum(-1, keepdim=True)
        live = old.live.gather(2, index)
        count = live.sum(-1, keepdim=True).clamp(min=1)
        weight = (keys / count).clamp(min=1.0).log().expand(index.shape).masked_fill(~live, -torch.inf)
        return old.take(index, weight)


@dataclass(frozen=True)
class RandomKeys(Policy):
    """Keep a uniform sample as if it were all there is, of weight one: what weights are good for, seen by their absence.

    Source: a baseline.   Differs: nothing.
    Cost: that of `UniformSample`.   Guarantee: none.
    """

    @property
    def weighted(self) -> bool:
        """What is dropped is gone."""
        return False

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Keep the smallest numbers, and their weights."""
        return keep_best(-lottery(full), full)
