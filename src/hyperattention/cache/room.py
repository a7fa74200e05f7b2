"""How the budget of a cache is divided for a policy."""

from itertools import count

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.policy import Policy
from hyperattention.cache.store import StoreFactory


def room_for(policy: Policy | StoreFactory, budget: int, sinks: int, window: int | None) -> CacheBudget:
    """Divide a budget into sinks, window and compressed slots.

    Args:
        policy: the rule for the kept keys, or the factory of stores.
        budget: slots of each head.
        sinks: number of first tokens that are always kept.
        window: number of latest tokens that are always kept. None means half of the budget; for a policy that keeps every
            key, a quarter of the budget and at most 64.

    Returns:
        the divided budget.

    Raises:
        ValueError: if sinks and window leave no slots.
    """
    if window is not None:
        return CacheBudget(budget, sinks, window)

    def usual(budget: int) -> int:
        return max(1, budget // 2 if isinstance(policy, Policy) else min(64, budget // 4))

    if 0 <= sinks >= budget - usual(budget):
        least = next(more for more in count(max(budget, 1) + 1) if more > sinks + usual(more))
        raise ValueError(
            f"budget={budget} leaves no slot besides {sinks} sinks and {usual(budget)} window keys: give at least {least}, "
            "or fewer sinks"
        )
    return CacheBudget(budget, sinks, usual(budget))
