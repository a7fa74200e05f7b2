"""A compressed cache for `generate`: a transformers `Cache` whose layers are stores."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from hyperattention.cache.audited import AuditedStore
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.cache_report import CacheReport, report_on
from hyperattention.cache.policy import Policy
from hyperattention.cache.room import room_for
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

__all__ = ["HyperCache"]


class HyperCache(Cache):
    """A KV cache of bounded size, or a full cache of which each step reads a part, for any model that `use` supports.

    When the budget is exceeded, a policy compresses the keys between sinks and window. The kept keys have weights if the
    policy defines them, and the model's attention reads the weights. A prompt is attended to exactly before it is
    compressed, unless it comes in chunks. Until the budget is exceeded, the output tokens equal those of `DynamicCache`.
    Layers with sliding windows, and layers that attend to images, keep transformers' own cache.

    The model must use hyperattention's attention, because no other implementation reads weights: generate inside `use`, or
    load the model with ``attn_implementation="hyperattention"`` after `register()`.

    Source: the caches of the policies' papers.   Differs: positions are those of the text, and attention reads weights.
    Cost: at most `budget` slots a head and step.   Guarantee: that of the policy.

    Args:
        config: the model's configuration, from which the kinds of its layers are read.
        budget: largest number of slots of each head, sinks and window included; for a policy that keeps every key, the
            largest number of keys that one step reads.
        policy: the rule for the kept keys, or for the keys that are read; None for `ClusterMeans`.
        sinks: number of first tokens that are always kept.
        window: number of latest tokens that are always kept. None means half of the budget; for a policy that keeps every
            key, a quarter of the budget and at most 64.
        seed: seed of every draw, which also depends on the layer's number.
        audit: N, to compute exact attention for one token in each run of N as well, over a copy of all keys and values;
            `report` then gives the error. None for no audit and no copy.
        allow_longer: whether a text may exceed the model's trained length, padding not counted. If False, a step that would
            exceed that length raises an error, because the model's output there is unreliable.

    Raises:
        ValueError: if the budget leaves no slot besides sinks and window, no layer has full attention, the model's attention
            reads other keys than those that its cache returns, a number is not an integer, `seed` is out of range, or
            `audit` is not positive.

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
            raise ValueError(f"policy={policy!r} is not a policy: give a policy object of this package, such as TopPages()")
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"the first argument is a {type(config).__name__}, not a configuration: give model.config")
        for name, number in {"budget": budget, "sinks": sinks, "window": window, "seed": seed}.items():
            if isinstance(number, bool) or not (isinstance(number, int) or (name == "window" and number is None)):
                what = "" if name == "seed" else " of slots"
                raise ValueError(f"{name}={number!r} is not an integer: give an integer number{what}")
        if not 0 <= seed < SEED_LIMIT:
            raise ValueError(f"seed={seed} is out of range: give an integer from 0 to {SEED_LIMIT - 1}")
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
            raise ValueError(
                f"{type(config).__name__} has no layer of full attention, so a compressed cache saves nothing: use "
                "transformers' DynamicCache"
            )
        previous: HyperCacheLayer | None = None
        for number in full:
            maker = StoreMaker(self.policy, self.room, number, seed, audit)
            previous = HyperCacheLayer(maker, previous, limit, count_readers(text_config, number))
            layers[number] = previous
        super().__init__(layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values to one layer, after a check that the model's attention reads weights.

        Args:
            key_states: new keys, ``[batch, kv_heads, new, head_dim]``.
            value_states: new values, ``[batch, kv_heads, new, value_dim]``.
            layer_idx: the number of the layer.
            args: passed to the layer.
            kwargs: passed to the layer.

        Returns:
            the keys and values to attend to.

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
        """The layers with sliding windows, by layer number."""
        found = {number: window_of(layer) for number, layer in enumerate(self.layers)}
        return {number: layer for number, layer in found.items() if layer is not None}

    @property
    def stores(self) -> dict[int, Store]:
        """The store of every compressed layer, by layer number."""
        return {number: layer.store for number, layer in enumerate(self.layers) if isinstance(layer, HyperCacheLayer)}

    def restore(self, states: Mapping[int, dict[str, Tensor]]) -> None:
        """Restore the states of all stores and of all layers with sliding windows.

        Args:
            states: the result of `state`: the state of each store and each sliding window, by layer number. An invalid state
                raises a ValueError and leaves the cache unchanged. The tensors may be on any device; a layer moves to the
                device of its new keys in the next step.
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
        """Return the states for `restore` by layer number, of the stores and the sliding windows only."""
        held = {number: store.state() for number, store in self.stores.items()}
        return held | {number: window_state(layer) for number, layer in self.windows.items()}

    def report(self) -> CacheReport | None:
        """Return the error that the audit has measured so far.

        Returns:
            the report; None if the cache was made without `audit`.
        """
        audited = {number: store for number, store in self.stores.items() if isinstance(store, AuditedStore)}
        return report_on(audited, self.whole_bytes) if audited else None

    @property
    def memory_bytes(self) -> int:
        """Bytes allocated by all stores, free slots included."""
        return sum(store.memory_bytes for store in self.stores.values())

    @property
    def whole_bytes(self) -> int:
        """Bytes of all keys and values that these layers have read, as a full cache would store them; 0 before the first."""
        return sum(layer.whole_bytes for layer in self.layers if isinstance(layer, HyperCacheLayer))
