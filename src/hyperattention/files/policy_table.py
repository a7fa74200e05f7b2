"""The policies that the file of a cache can hold."""

from hyperattention.cache.page_rank import Bounds, Midpoint, TwoLevels
from hyperattention.cache.policy import Policy
from hyperattention.cache.store import StoreFactory
from hyperattention.files.fields import Field
from hyperattention.files.part_table import PartTable
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

# a new policy needs a line here
_TYPES = (
    BalancedHalving,
    Bounds,
    ClusterCentres,
    ClusterMeans,
    HeavyHitters,
    LastWindow,
    Latest,
    Leverage,
    LookOnce,
    Midpoint,
    RandomKeys,
    SubGen,
    TopPages,
    TwoLevels,
    UniformSample,
)
POLICIES = PartTable(_TYPES)


def policy_to_json(policy: Policy | StoreFactory) -> object:
    """Convert a policy to JSON values.

    Args:
        policy: the policy.

    Returns:
        nested objects, each with the name of its type.

    Raises:
        ValueError: if a type is not in the table.

    Example:
        >>> policy_to_json(TopPages(page=16))["by"]
        {'type': 'Bounds', 'reach': 0.5}
    """
    try:
        return POLICIES.write(policy)
    except TypeError as error:
        raise ValueError(
            f"the policy {policy!r} cannot be kept in a file: use one of {', '.join(POLICIES.by_name)}, or add its "
            "type to the table of files/policy_table.py"
        ) from error


def policy_from_json(field: Field) -> Policy | StoreFactory:
    """Build a policy from the result of `policy_to_json`.

    Args:
        field: the field with the policy.

    Returns:
        the policy; any other value, an unknown type or a wrong argument raises ValueError.
    """
    policy = POLICIES.read(field)
    if not isinstance(policy, Policy | StoreFactory):
        field.refuse("it must be a policy, such as ClusterMeans or TopPages")
    return policy
