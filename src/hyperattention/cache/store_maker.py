"""How the stores of a layer are made: a value, so that a cache can be copied and pickled with what makes its stores."""

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
        policy: what is kept, or how it is read.
        room: how much each head may hold, or read in a step.
        layer: layer of the model, a counter of every draw.
        seed: seed of every draw.
        audit: positions of which one is audited; None for no audit.
    """

    policy: Policy | StoreFactory
    room: CacheBudget
    layer: int
    seed: int
    audit: int | None = None

    def make(self, previous: Store | None) -> Store:
        """Make an empty store.

        Args:
            previous: the store of the layer before, where there is one: neighbours may share what they chose.

        Returns:
            the store, without an audit.
        """
        if isinstance(self.policy, Policy):
            return CompressingStore(self.policy, self.room, layer=self.layer, seed=self.seed)
        return self.policy.store(self.room, self.layer, self.seed, previous)

    def watched(self, inner: Store) -> Store:
        """Put a store under audit, if there is to be one.

        Args:
            inner: the store.

        Returns:
            the store that is read.
        """
        return inner if self.audit is None else AuditedStore(inner, self.audit, self.seed)
