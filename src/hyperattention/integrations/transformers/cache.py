"""A compressed cache for `generate`: a transformers `Cache` whose layers are stores."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from hyperattention.cache.audited import AuditedStore
from hyperattention.cache.cache_report import CacheReport, report_on
from hyperattention.cache.condensing import CondensingStore
from hyperattention.cache.policy import Policy
from hyperattention.cache.room import Room
from hyperattention.cache.store import Keeping, Store
from hyperattention.check import positive
from hyperattention.integrations.transformers.cache_handle import READS_HELD
from hyperattention.integrations.transformers.cache_layer import HyperCacheLayer
from hyperattention.integrations.transformers.trained_length import trained_length
from hyperattention.policies.cluster_means import ClusterMeans

__all__ = ["HyperCache", "room_for"]


def room_for(policy: Policy | Keeping, budget: int, sinks: int, window: int | None) -> Room:
    """Divide a budget.

    Args:
        policy: what is kept, or how it is read.
        budget: slots of each head.
        sinks: first tokens that are always kept.
        window: latest tokens that are always kept; None for half of the budget, or for a quarter, and 64 at most, with a
            policy that keeps everything.

    Returns:
        the room.

    Raises:
        ValueError: if sinks and window leave nothing.
    """
    if window is not None:
        return Room(budget, sinks, window)

    def usual(budget: int) -> int:
        return max(1, budget // 2 if isinstance(policy, Policy) else min(64, budget // 4))

    if 0 <= sinks >= budget - usual(budget):
        least = next(more for more in count(max(budget, 1) + 1) if more > sinks + usual(more))
        raise ValueError(
            f"budget={budget} leaves nothing beside {sinks} sinks and {usual(budget)} of window: give at least {least}, or "
            "fewer sinks"
        )
    return Room(budget, sinks, usual(budget))


class HyperCache(Cache):
    """A cache of bounded size, or one that is only read in part, for any model that `use` can switch.

    Keys between sinks and window are condensed by a policy when the budget is exceeded, with weights where the policy says
    what the kept ones stand for; the model's attention reads the weights. Prompts are attended to in full before they are
    condensed, unless they come in chunks. Up to the budget, tokens are those of `DynamicCache`. Layers with sliding windows
    keep transformers' own cache.

    The model's attention must be hyperattention's, which alone can read weights: generate inside `use`, or load the model
    with ``attn_implementation="hyperattention"`` after `register()`.

    Source: the caches of the policies' papers.   Differs: positions are those of the text, and weights reach attention.
    Cost: at most `budget` slots a head and step.   Guarantee: that of the policy.

    Args:
        config: the model's configuration, which tells what its layers are.
        budget: most slots of each head, sinks and window included; for a policy that keeps everything, most keys that one
            step reads.
        policy: what is kept, or how it is read; None for `ClusterMeans`.
        sinks: first tokens that are always kept.
        window: latest tokens that are always kept; None for half of the budget, or 64 at most for a policy that keeps
            everything.
        seed: of every draw; the layer's number enters too.
        audit: one token in so many is also attended to exactly, over a copy of all keys and values, and `report` tells the
            error; None for no audit, and no copy.
        beyond: whether to go on beyond the length that the model was made for, padding not counted; otherwise a step that
            would exceed it is refused, because what a model says there means nothing.

    Raises:
        ValueError: if the budget leaves nothing beside sinks and window, no layer has full attention, or `audit` is not
            positive.

    Example:
        >>> cache = HyperCache(model.config, budget=1024)  # doctest: +SKIP
        >>> with use(model, Exact()):  # doctest: +SKIP
        ...     model.generate(**inputs, past_key_values=cache)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        budget: int,
        policy: Policy | Keeping | None = None,
        sinks: int = 16,
        window: int | None = None,
        seed: int = 0,
        audit: int | None = None,
        beyond: bool = False,
    ) -> None:
        """Make an empty cache."""
        self.policy = ClusterMeans() if policy is None else policy
        if audit is not None:
            positive("HyperCache", audit=audit)
        if not isinstance(self.policy, Policy | Keeping):
            raise ValueError(
                f"policy={policy!r} is no policy: give one of the package's, made with its arguments, such as TopPages()"
            )
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(
                f"the first argument is a {type(config).__name__}: give the model's configuration, model.config"
            )
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise ValueError(f"budget={budget!r}: give a whole number of slots")
        self.room = room_for(self.policy, budget, sinks, window)
        self.seed = seed
        text_config = config.get_text_config(decoder=True)
        # a function is not copied: copies of this cache, too, ask the model's own configuration, which `use` switches
        self._attention_name = lambda: text_config._attn_implementation
        limit = None if beyond else trained_length(text_config)
        layers = list(DynamicCache(config=config).layers)
        full = [number for number, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            raise ValueError(f"{type(config).__name__} has no layer of full attention: there is nothing to compress")
        watched = (lambda store: store) if audit is None else partial(AuditedStore, every=audit, seed=seed)
        previous: HyperCacheLayer | None = None
        for number in full:
            previous = HyperCacheLayer(self._maker(number), watched, previous, limit)
            layers[number] = previous
        super().__init__(layers=layers)

    def _maker(self, number: int) -> Callable[[Store | None], Store]:
        policy, room, seed = self.policy, self.room, self.seed
        if isinstance(policy, Policy):
            return lambda previous: CondensingStore(policy, room, layer=number, seed=seed)
        return lambda previous: policy.store(room, number, seed, previous)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Update one layer, after a look at who is going to read it.

        Args:
            key_states: ``[batch, kv_heads, new, head_dim]``.
            value_states: likewise.
            layer_idx: which layer.
            args: passed on to the layer.
            kwargs: likewise.

        Returns:
            keys and values to attend to.

        Raises:
            ValueError: if the model's attention cannot read weights.
        """
        name = self._attention_name()
        reader = AttentionInterface().get(name)
        if not getattr(reader, READS_HELD, False):
            raise ValueError(
                f"attn_implementation={name!r} cannot read the weights of a compressed cache: generate inside "
                "`with use(model, method):`, or load the model with attn_implementation='hyperattention' after register()"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def stores(self) -> dict[int, Store]:
        """Give the store of every layer that has one, by the layer's number."""
        return {number: layer.store for number, layer in enumerate(self.layers) if isinstance(layer, HyperCacheLayer)}

    def restore(self, states: Mapping[int, dict[str, Tensor]]) -> None:
        """Go on from the states of all stores.

        Args:
            states: what each store's `state` gave, by the number of the layer; where one is refused, with a ValueError,
                nothing of the cache changes.
        """
        layers = {number: layer for number, layer in enumerate(self.layers) if isinstance(layer, HyperCacheLayer)}
        before = [(layer, layer.inner, layer.store, layer.is_initialized) for layer in layers.values()]
        try:
            for number, layer in layers.items():
                layer.reset()
                layer.store.restore(states[number])
                layer.begin_at(layer.store.seen)
        except BaseException:
            for layer, inner, store, initialised in before:
                layer.inner, layer.store, layer.is_initialized = inner, store, initialised
            raise

    def report(self) -> CacheReport | None:
        """Tell the error that the audit has measured so far.

        Returns:
            the report; None without `audit`.
        """
        audited = {number: store for number, store in self.stores.items() if isinstance(store, AuditedStore)}
        return report_on(audited, self.whole_bytes) if audited else None

    @property
    def memory_bytes(self) -> int:
        """Bytes held by all stores, room for more included."""
        return sum(store.memory_bytes for store in self.stores.values())

    @property
    def whole_bytes(self) -> int:
        """Bytes that the same layers would hold, had all keys and values been kept; 0 before any came by."""
        return sum(layer.whole_bytes for layer in self.layers if isinstance(layer, HyperCacheLayer))
