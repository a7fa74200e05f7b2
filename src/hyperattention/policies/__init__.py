"""Policies that choose which keys a cache keeps or reads: one policy per file."""

from hyperattention.cache.page_rank import Bounds, Midpoint, TwoLevels
from hyperattention.cache.policy import Policy
from hyperattention.policies.balanced_halving import BalancedHalving
from hyperattention.policies.cluster_centres import ClusterCentres
from hyperattention.policies.cluster_means import ClusterMeans
from hyperattention.policies.heavy_hitters import HeavyHitters
from hyperattention.policies.last_window import LastWindow
from hyperattention.policies.latest import Latest
from hyperattention.policies.leverage import Leverage
from hyperattention.policies.look_once import LookOnce
from hyperattention.policies.subgen import SubGen
from hyperattention.policies.top_pages import TopPages
from hyperattention.policies.uniform_sample import RandomKeys, UniformSample

__all__ = [
    "BalancedHalving",
    "Bounds",
    "ClusterCentres",
    "ClusterMeans",
    "HeavyHitters",
    "LastWindow",
    "Latest",
    "Leverage",
    "LookOnce",
    "Midpoint",
    "Policy",
    "RandomKeys",
    "SubGen",
    "TopPages",
    "TwoLevels",
    "UniformSample",
]
