"""One layer of a compressed cache: what transformers asks of a layer, answered by a store."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hyperattention.cache.store import Store
from hyperattention.integrations.transformers.cache_handle import Handle, attach


class HyperCacheLayer(CacheLayerMixin):
    """One layer of a `HyperCache`.

    Args:
        make_store: makes an empty store, given the store of the layer before.
        audit: puts a store under audit, or gives it back.
        previous: the layer before, which is held so that copies of a cache find their own.
        limit: most tokens of a text, padding not counted; None for no limit.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(
        self,
        make_store: Callable[[Store | None], Store],
        audit: Callable[[Store], Store],
        previous: "HyperCacheLayer | None",
        limit: int | None,
    ) -> None:
        """Hold nothing."""
        super().__init__()
        self._make_store, self._audit, self._previous, self._limit = make_store, audit, previous, limit
        # what the next layer may share, and what is read, which may watch over it
        self.inner = make_store(None if previous is None else previous.inner)
        self.store = audit(self.inner)
        self._handle: Handle | None = None
        self._token_bytes = self._text = 0

    @property
    def whole_bytes(self) -> int:
        """Bytes of the keys and values of every token seen, had all been kept; 0 before any came by."""
        return self._token_bytes * self.store.seen * self.store.batch

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
        self._token_bytes = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (key_states, value_states))
        k, v = self.store.append(key_states, value_states)
        self._text = self._length()
        self._handle = Handle(self.store, key_states.shape[2], self._text, self._limit)
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
        self.inner = self._make_store(None if self._previous is None else self._previous.inner)
        self.store, self._handle, self._text, self.is_initialized = self._audit(self.inner), None, 0, False

    def begin_at(self, text: int) -> None:
        """Go on from what the store was given.

        Args:
            text: tokens of the longest row so far.
        """
        self._handle, self._text, self.is_initialized = None, text, True

    def _length(self) -> int:
        """Count the tokens of the longest row, padding left out as attention told."""
        return self._text if self._handle is None else self._handle.text

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.store.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.is_initialized:
            self.store.take_rows(torch.arange(self._batch(), dtype=torch.int64, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        if self.is_initialized:
            self.store.take_rows(torch.arange(self._batch(), dtype=torch.int64, device="cpu")[indices.cpu()])

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
            self.begin_at(self._length() - num)
