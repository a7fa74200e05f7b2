"""Every policy of a compressed cache that the laws are tested on: a new policy is one more line here."""

from dataclasses import dataclass

from hyperattention.condense.latest import Latest
from hyperattention.condense.policy import Policy
from hyperattention.condense.uniform_sample import RandomKeys, UniformSample


@dataclass(frozen=True)
class PolicyCase:
    """A policy, with a name for its tests.

    Args:
        name: what the test is called.
        policy: the policy.
    """

    name: str
    policy: Policy


POLICIES = (
    PolicyCase("latest", Latest()),
    PolicyCase("uniform sample", UniformSample()),
    PolicyCase("random keys", RandomKeys()),
)
