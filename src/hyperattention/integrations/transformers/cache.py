"""A compressed cache for `generate`: a transformers `Cache` whose layers are stores."""

from collections.abc import Mapping
from itertools import count
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from hyperattention.cache.audited import AuditedStore
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.cache_report import CacheReport, report_on
from hyperattention.cache.policy import Policy
from hyperattention.cache.store import Store, StoreFactory
from hyperattention.cache.store_maker import StoreMaker
from hyperattention.check import positive
from hyperattention.integrations.transformers.attention_name import AttentionName
from hyperattention.integrations.transformers.cache_handle import READS_HELD
from hyperattention.integrations.transformers.cache_layer import HyperCacheLayer
from hyperattention.integrations.transformers.served import check_served, count_readers, cross_attention_layers
from hyperattention.integrations.transformers.trained_length import trained_length
from hyperattention.integrations.transformers.windowed_layer import move_window, restore_window, window_of, window_state
from hyperattention.policies.cluster_means import ClusterMeans
from hyperattention.random import SEED_LIMIT

__all__ = ["HyperCache", "room_for"]


def room_for(policy: Policy | StoreFactory, budget: int, sinks: int, window: int | None) -> CacheBudget:
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
        return CacheBudget(budget, sinks, window)

    def usual(budget: int) -> int:
        return max(1, budget // 2 if isinstance(policy, Policy) else min(64, budget // 4))

    if 0 <= sinks >= budget - usual(budget):
        least = next(more for more in count(max(budget, 1) + 1) if more > sinks + usual(more))
        raise ValueError(
            f"budget={budget} leaves nothing beside {sinks} sinks and {usual(budget)} of window: give at least {least}, or "
            "fewer sinks"
        )
    return CacheBudget(budget, sinks, usual(budget))


class HyperCache(Cache):
    """A cache of bounded size, or one that is only read in part, for any model that `use` can switch.

    Keys between sinks and window are compressed by a policy when the budget is exceeded, with weights where the policy says
    what the kept ones stand for; the model's attention reads the weights. Prompts are attended to in full before they are
    compressed, unless they come in chunks. Up to the budget, tokens are those of `DynamicCache`. Layers with sliding
    windows, and those that attend to images, keep transformers' own cache.

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
        audit: N, to attend to one token in each run of N exactly as well, over a copy of all keys and values; `report` then
            gives the error. None for no audit, and no copy.
        allow_longer: whether to go on beyond the length that the model was made for, padding not counted; otherwise a step
            that would exceed it is refused, because what a model says there means nothing.

    Raises:
        ValueError: if the budget leaves nothing beside sinks and window, no layer has full attention, the model's attention
            reads other keys than its cache hands out, a number is not whole, `seed` is out of range, or `audit` is not
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
        policy: Policy | StoreFactory | None = None,
        sinks: int = 16,
        window: int | None = None,
        seed: int = 0,
        audit: int | None = None,
        allow_longer: bool = False,
    ) -> None:
        """Make an empty cache."""
        self.policy: Policy | StoreFactory = ClusterMeans() if policy is None else policy
        if audit is not None:
            positive("HyperCache", audit=audit)
        if not isinstance(self.policy, Policy | StoreFactory):
            raise ValueError(
                f"policy={policy!r} is no policy: give one of the package's, made with its arguments, such as TopPages()"
            )
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(
                f"the first argument is a {type(config).__name__}: give the model's configuration, model.config"
            )
        for name, number in {"budget": budget, "sinks": sinks, "window": window, "seed": seed}.items():
            if isinstance(number, bool) or not (isinstance(number, int) or (name == "window" and number is None)):
                what = "" if name == "seed" else " of slots"
                raise ValueError(f"{name}={number!r}: give a whole number{what}")
        if not 0 <= seed < SEED_LIMIT:
            raise ValueError(f"seed={seed}: give a whole number from 0 to {SEED_LIMIT - 1}")
        self.room: CacheBudget = room_for(self.policy, budget, sinks, window)
        self.seed = seed
        text_config = config.get_text_config(decoder=True)
        check_served(text_config)
        self._attention = AttentionName(text_config)
        limit = None if allow_longer else trained_length(text_config)
        layers = list(DynamicCache(config=config).layers)
        others = cross_attention_layers(text_config)
        full = [n for n, layer in enumerate(layers) if type(layer) is DynamicLayer and n not in others]
        if not full:
            raise ValueError(f"{type(config).__name__} has no layer of full attention: there is nothing to compress")
        previous: HyperCacheLayer | None = None
        for number in full:
            maker = StoreMaker(self.policy, self.room, number, seed, audit)
            previous = HyperCacheLayer(maker, previous, limit, count_readers(text_config, number))
            layers[number] = previous
        super().__init__(layers=layers)

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
        name = self._attention.now
        if name is not None and not getattr(AttentionInterface().get(name), READS_HELD, False):
            raise ValueError(
                f"attn_implementation={name!r} cannot read the weights of a compressed cache: generate inside "
                "`with use(model, method):`, or load the model with attn_implementation='hyperattention' after register()"
            )
        if (window := window_of(self.layers[layer_idx])) is not None:
            move_window(window, key_states.device)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def windows(self) -> dict[int, DynamicSlidingWindowLayer]:
        """Give every layer that keeps a sliding window, by its number."""
        found = {number: window_of(layer) for number, layer in enumerate(self.layers)}
        return {number: layer for number, layer in found.items() if layer is not None}

    @property
    def stores(self) -> dict[int, Store]:
        """Give the store of every layer that has one, by the layer's number."""
        return {number: layer.store for number, layer in enumerate(self.layers) if isinstance(layer, HyperCacheLayer)}

    def restore(self, states: Mapping[int, dict[str, Tensor]]) -> None:
        """Go on from the states of all stores, and of all layers with sliding windows.

        Args:
            states: what each store's `state` gave, and each window's, by the number of the layer; where one is refused, with
                a ValueError, nothing of the cache changes. They may lie on any device: a layer moves to its keys' when it
                goes on.
        """
        before = [(layer, dict(vars(layer))) for layer in self.layers]
        try:
            for number, layer in enumerate(self.layers):
                if isinstance(layer, HyperCacheLayer):
                    layer.reset()
                    layer.store.restore(states[number])
                    layer.begin_at(layer.store.seen)
                elif (window := window_of(layer)) is not None:
                    restore_window(window, states[number])
        except BaseException:
            for layer, attributes in before:
                vars(layer).update(attributes)
            raise

    def state(self) -> dict[int, dict[str, Tensor]]:
        """Give what `restore` takes, by the number of the layer: of stores and windows, and of no other layers."""
        held = {number: store.state() for number, store in self.stores.items()}
        return held | {number: window_state(layer) for number, layer in self.windows.items()}

    def report(self) -> CacheReport | None:
        """Return the error that the audit has measured so far.

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
