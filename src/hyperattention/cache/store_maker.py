"""The recipe for the stores of a layer: a value, so that a cache can be copied and pickled together with it."""

from dataclasses import dataclass

from hyperattention.cache.audited import AuditedStore
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.compressing import CompressingStore
from hyperattention.cache.policy import Policy
from hyperattention.cache.store import Store, StoreFactory


@dataclass(frozen=True)
class StoreMaker:
    """Make empty stores for one layer.

    Args:
        policy: the policy, or the factory of another kind of store.
        room: number of keys that each head may hold, or read in a step.
        layer: layer of the model, a counter of every draw.
        seed: seed of every draw.
        audit: length of the runs of positions; one position of each run is audited. None for no audit.
    """

    policy: Policy | StoreFactory
    room: CacheBudget
    layer: int
    seed: int
    audit: int | None = None

    def make(self, previous: Store | None) -> Store:
        """Make an empty store.

        Args:
            previous: the store of the previous layer, if any: neighbouring layers may share their choice.

        Returns:
            the store, without an audit.
        """
        if isinstance(self.policy, Policy):
            return CompressingStore(self.policy, self.room, layer=self.layer, seed=self.seed)
        return self.policy.store(self.room, self.layer, self.seed, previous)

    def watched(self, inner: Store) -> Store:
        """Wrap a store in an audit, if one is wanted.

        Args:
            inner: the store.

        Returns:
            the store to use.
        """
        return inner if self.audit is None else AuditedStore(inner, self.audit, self.seed)
