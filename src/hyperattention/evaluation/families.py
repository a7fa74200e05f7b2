"""The kinds of caches that are compared, by the names that users type. A new policy needs one more line in `ENTRANTS`."""

from collections.abc import Sequence
from dataclasses import dataclass

from hyperattention.cache.page_rank import Bounds, TwoLevels
from hyperattention.cache.policy import Policy
from hyperattention.cache.room import room_for
from hyperattention.cache.store import StoreFactory
from hyperattention.policies.balanced_halving import BalancedHalving
from hyperattention.policies.cluster_centres import ClusterCentres
from hyperattention.policies.cluster_means import ClusterMeans
from hyperattention.policies.heavy_hitters import HeavyHitters
from hyperattention.policies.last_window import LastWindow
from hyperattention.policies.latest import Latest
from hyperattention.policies.leverage import Leverage
from hyperattention.policies.look_once import LookOnce
from hyperattention.policies.top_pages import TopPages
from hyperattention.policies.uniform_sample import RandomKeys, UniformSample


@dataclass(frozen=True)
class CacheFamily:
    """One kind of cache.

    Args:
        name: the name in commands, tables and records.
        policy: the policy or store factory of the cache; None for a full cache at any budget.
        baseline: whether the cache is always part of the comparison.
    """

    name: str
    policy: Policy | StoreFactory | None
    baseline: bool = False

    def check(self, budget: int, sinks: int = 16, window: int | None = None) -> None:
        """Refuse a budget that leaves no slot besides sinks and window; a cache that drops no keys does not use them.

        Args:
            budget: slots of each head.
            sinks: number of first tokens that are always kept.
            window: number of latest tokens that are always kept; None for the default of the policy.
        """
        if self.policy is not None:
            room_for(self.policy, budget, sinks, window)


EXACT = CacheFamily("exact", None, baseline=True)
ENTRANTS = (
    EXACT,
    CacheFamily("streaming", Latest(), baseline=True),
    CacheFamily("uniform", UniformSample(), baseline=True),
    CacheFamily("random", RandomKeys(), baseline=True),
    CacheFamily("cluster_means", ClusterMeans()),
    CacheFamily("cluster_centres", ClusterCentres()),
    CacheFamily("last_window", LastWindow()),
    CacheFamily("heavy_hitters", HeavyHitters()),
    CacheFamily("leverage", Leverage()),
    CacheFamily("halving", BalancedHalving()),
    CacheFamily("pages", TopPages()),
    CacheFamily("quest", TopPages(by=Bounds(), page=16)),
    CacheFamily("two_levels", TopPages(by=TwoLevels(), page=16)),
    CacheFamily("look_once", LookOnce()),
)


def choose_families(names: Sequence[str] | None = None) -> tuple[CacheFamily, ...]:
    """Find families by name. The baselines are always included; exact attention comes first.

    Args:
        names: the names of families beside the baselines; None for all.

    Returns:
        the families, in the order of the table.

    Raises:
        ValueError: if a name is unknown.
    """
    known = [each.name for each in ENTRANTS]
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"unknown policies {', '.join(unknown)}: choose from {', '.join(known)}")
    return tuple(each for each in ENTRANTS if each.baseline or names is None or each.name in names)


def find_family(name: str) -> CacheFamily:
    """Find one family by name.

    Args:
        name: a name in `ENTRANTS`.

    Returns:
        the family.

    Raises:
        ValueError: if the name is unknown.
    """
    for each in ENTRANTS:
        if each.name == name:
            return each
    raise ValueError(f"unknown policy {name!r}: choose from {', '.join(each.name for each in ENTRANTS)}")
