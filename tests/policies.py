"""Every policy of a compressed cache that the laws are tested on: a new policy is one more line here."""

from dataclasses import dataclass

from hyperattention.cache.policy import Policy
from hyperattention.policies.balanced_halving import BalancedHalving
from hyperattention.policies.cluster_centres import ClusterCentres
from hyperattention.policies.cluster_means import ClusterMeans
from hyperattention.policies.heavy_hitters import HeavyHitters
from hyperattention.policies.last_window import LastWindow
from hyperattention.policies.latest import Latest
from hyperattention.policies.leverage import Leverage
from hyperattention.policies.uniform_sample import RandomKeys, UniformSample


@dataclass(frozen=True)
class PolicyCase:
    """A policy, with a name for its tests.

    Args:
        name: what the test is called.
        policy: the policy.
        unbiased: whether every key's expected weight is the one it had.
        keeps_total: whether total weight stays what it was, to rounding, where keys may come with weights of their own.
        ignores_weights: whether that holds only of keys whose weights are one.
        merges: whether a slot may stand for several keys, so that fewer slots than there is room for may be live.
        averages: whether a slot's position is a mean of positions: two may round to one, and to that of an empty slot.
        adds_weight: whether total weight may grow, and never falls.
    """

    name: str
    policy: Policy
    unbiased: bool = False
    keeps_total: bool = False
    ignores_weights: bool = False
    merges: bool = False
    averages: bool = False
    adds_weight: bool = False


POLICIES = (
    PolicyCase("latest", Latest()),
    PolicyCase("uniform sample", UniformSample(), unbiased=True, keeps_total=True, ignores_weights=True),
    PolicyCase("random keys", RandomKeys()),
    PolicyCase("heavy hitters", HeavyHitters()),
    PolicyCase("last window", LastWindow(8)),
    PolicyCase("leverage", Leverage()),
    PolicyCase("balanced halving", BalancedHalving(), unbiased=True),
    PolicyCase("cluster centres", ClusterCentres(), keeps_total=True, merges=True),
    PolicyCase("cluster means", ClusterMeans(latest=8), merges=True, averages=True, adds_weight=True),
    PolicyCase("cluster means, uncorrected", ClusterMeans(correction=0.0), keeps_total=True, merges=True, averages=True),
)
