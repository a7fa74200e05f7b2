"""A compressed cache for `generate`: a transformers `Cache` whose layers are stores."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from hyperattention.cache.condensing import CondensingStore
from hyperattention.cache.room import Room
from hyperattention.cache.store import Keeping, Store
from hyperattention.condense.cluster_means import ClusterMeans
from hyperattention.condense.policy import Policy
from hyperattention.integrations.transformers_held import READS_HELD, Handle, attach

__all__ = ["HyperCache"]


class HyperCacheLayer(CacheLayerMixin):
    """One layer of a `HyperCache`: what transformers asks of a layer, answered by a store."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, make_store: Callable[[], Store]) -> None:
        """Hold nothing."""
        super().__init__()
        self._make_store, self.store = make_store, make_store()
        self._handle: Handle | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note that something is held; stores make their own room."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys in, and hand out all of them with the handle through which they are read.

        Args:
            key_states: ``[batch, kv_heads, new, head_dim]``.
            value_states: likewise.
            args: what other versions of transformers pass along; unused.
            kwargs: likewise.

        Returns:
            keys and values of all slots.

        Raises:
            ValueError: if the keys handed out last were not read through their handle, or gradients are asked for.
        """
        if self._handle is not None and not self._handle.collected:
            raise ValueError(
                "the model changed the keys between its cache and its attention, so that their weights were lost: "
                f"{type(self).__name__} cannot serve it; use transformers' DynamicCache"
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError("a compressed cache has no gradient: use torch.no_grad(), or use_cache=False")
        self.is_initialized = True
        k, v = self.store.append(key_states, value_states)
        self._handle = Handle(self.store, key_states.shape[2])
        return attach(k, self._handle), v

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tell how many keys the next step is shown, and the position that the first would have if all were recent."""
        new = query_length.numel() if isinstance(query_length, Tensor) else query_length
        return self.store.num_slots + new, self.store.seen - self.store.num_slots

    def get_seq_length(self) -> int:
        """Tell the true length, from which positions follow."""
        return self.store.seen

    def get_max_length(self) -> int:
        """Say that there is no longest text."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Say the same to older versions."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.store, self._handle, self.is_initialized = self._make_store(), None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.store.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.is_initialized:
            self.store.take_rows(torch.arange(self._batch()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        if self.is_initialized:
            self.store.take_rows(torch.arange(self._batch())[indices.cpu()])

    def _batch(self) -> int:
        return self.store.batch

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the latest tokens.

        Args:
            tokens_to_remove: their number, negative; positive for the length to keep, as versions before 5.16 say it. Some
                versions give a tensor of one.
        """
        size = int(tokens_to_remove)
        num = -size if size <= 0 else max(0, self.store.seen - size)
        if num:
            self.store.crop(num)


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
        window: latest tokens that are always kept; None for half of the budget, or 128 at most for a policy that keeps
            everything.
        seed: of every draw; the layer's number enters too.

    Raises:
        ValueError: if the budget leaves nothing beside sinks and window, or no layer has full attention.

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
    ) -> None:
        """Make an empty cache."""
        self.policy = ClusterMeans() if policy is None else policy
        if window is None:
            window = max(1, budget // 2 if isinstance(self.policy, Policy) else min(128, budget // 4))
        self.room, self.seed = Room(budget, sinks, window), seed
        self._config = config.get_text_config(decoder=True)
        layers = list(DynamicCache(config=config).layers)
        full = [number for number, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            raise ValueError(f"{type(config).__name__} has no layer of full attention: there is nothing to compress")
        previous: HyperCacheLayer | None = None
        for number in full:
            previous = HyperCacheLayer(self._maker(number, previous))
            layers[number] = previous
        super().__init__(layers=layers)

    def _maker(self, number: int, previous: HyperCacheLayer | None) -> Callable[[], Store]:
        policy, room, seed = self.policy, self.room, self.seed
        if isinstance(policy, Policy):
            return lambda: CondensingStore(policy, room, layer=number, seed=seed)
        return lambda: policy.store(room, number, seed, None if previous is None else previous.store)

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
        name = self._config._attn_implementation
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
        before = [(layer, layer.store, layer.is_initialized) for layer in layers.values()]
        try:
            for number, layer in layers.items():
                layer.reset()
                layer.store.restore(states[number])
                layer.is_initialized = True
        except BaseException:
            for layer, store, initialised in before:
                layer.store, layer.is_initialized = store, initialised
            raise

    @property
    def memory_bytes(self) -> int:
        """Bytes held by all stores, room for more included."""
        return sum(store.memory_bytes for store in self.stores.values())
