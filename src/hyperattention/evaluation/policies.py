"""The compared caches: kinds of caches at budgets."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from hyperattention.evaluation.families import CacheFamily
from hyperattention.integrations.transformers.cache import HyperCache


@dataclass(frozen=True)
class CacheCandidate:
    """A family at a budget.

    Args:
        family: the family.
        budget: slots of each head.
        sinks: number of first tokens that are always kept.
        window: number of latest tokens that are always kept; None for the default of `HyperCache` for the policy.
    """

    family: CacheFamily
    budget: int
    sinks: int = 16
    window: int | None = None

    def __post_init__(self) -> None:
        self.family.check(self.budget, self.sinks, self.window)

    @property
    def name(self) -> str:
        """The name in tables: the family, and the budget if the family has one."""
        return self.family.name if self.family.policy is None else f"{self.family.name}@{self.budget}"

    def cache(
        self, model: PreTrainedModel, length: int, seed: int, *, audit: int | None = None, allow_longer: bool = False
    ) -> HyperCache:
        """Make an empty cache.

        Args:
            model: the model that will fill the cache.
            length: largest number of tokens in the cache, which is the budget of a cache that drops no keys.
            seed: seed of every draw.
            audit: N, to audit one token in each run of N; None for no audit.
            allow_longer: whether a text may exceed the model's trained length.

        Returns:
            the cache.
        """
        # a cache that drops no keys does not use sinks and window
        if self.family.policy is None:
            budget, sinks, window = max(length, self.budget, 2), 0, 1
        else:
            budget, sinks, window = self.budget, self.sinks, self.window
        return HyperCache(
            model.config,
            budget=budget,
            policy=self.family.policy,
            sinks=sinks,
            window=window,
            seed=seed,
            audit=audit,
            allow_longer=allow_longer,
        )


def candidates_at(families: Sequence[CacheFamily], budgets: Sequence[int]) -> tuple[CacheCandidate, ...]:
    """Combine every family with every budget. Exact attention has no budget; it comes first, and once.

    Args:
        families: the families.
        budgets: slots of each head.

    Returns:
        the candidates.
    """
    whole = [CacheCandidate(each, budgets[0]) for each in families if each.policy is None]
    return (*whole, *(CacheCandidate(each, budget) for budget in budgets for each in families if each.policy is not None))
