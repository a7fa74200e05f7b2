"""One layer of a compressed cache: the layer interface of transformers, implemented with a store."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hyperattention.cache.buffer import is_writable
from hyperattention.cache.store_maker import StoreMaker
from hyperattention.integrations.transformers.cache_handle import Handle, attach
from hyperattention.integrations.transformers.cache_padding import NOTHING_TOLD, PaddingSoFar


class HyperCacheLayer(CacheLayerMixin):
    """One layer of a `HyperCache`.

    Args:
        maker: makes the stores of this layer.
        previous: the layer before; kept as a reference, so that a copied cache refers to its own layers.
        limit: largest number of tokens of a text, padding not counted; None for no limit.
        readers: number of layers whose attention reads the keys of this layer, itself included.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(
        self,
        maker: StoreMaker,
        previous: "HyperCacheLayer | None",
        limit: int | None,
        readers: int = 1,
    ) -> None:
        """Make an empty layer."""
        super().__init__()
        self._maker, self._previous, self._limit, self._readers = maker, previous, limit, readers
        # `inner` may be shared with the next layer; `store` is read, and may be a wrapper that audits `inner`
        self.inner = maker.make(None if previous is None else previous.inner)
        self.store = maker.watched(self.inner)
        self._handle: Handle | None = None
        self._told: PaddingSoFar = NOTHING_TOLD
        self._token_bytes = self._text = 0
        # what a reader that does not take the handle reads: NaN
        self._unread: Tensor | None = None

    @property
    def whole_bytes(self) -> int:
        """Bytes of the keys and values of every token seen, as a full cache would store them; 0 before the first."""
        return self._token_bytes * self.store.seen * self.store.batch

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Mark the layer as initialised; stores allocate their own memory."""
        # some models read the lengths of these tensors; the keys themselves are only in the store
        self.keys, self.values, self.is_initialized = key_states.new_empty(0), value_states.new_empty(0), True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values, and return all slots with the handle through which attention reads them.

        Args:
            key_states: new keys, ``[batch, kv_heads, new, head_dim]``.
            value_states: new values, ``[batch, kv_heads, new, value_dim]``.
            args: arguments of other versions of transformers; unused.
            kwargs: arguments of other versions of transformers; unused.

        Returns:
            keys and values of all slots.

        Raises:
            ValueError: if attention did not read the previous keys through their handle, or gradients are required.
        """
        self._end_step()
        # the previous layer has attended by now: an unsupported model raises an error before it has read its text
        if self._previous is not None:
            self._previous._insist_read()
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError("a compressed cache supports no gradients: use torch.no_grad(), or use_cache=False")
        self.lazy_initialization(key_states, value_states)
        self._token_bytes = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (key_states, value_states))
        if self.store.device not in (None, key_states.device):
            self.store.move(key_states.device)
        k, v = self.store.append(key_states, value_states)
        self._text, self._told = self._length(), self._heard()
        self._handle = Handle(self.store, key_states.shape[2], self._text, self._limit, self._told, self._readers)
        return attach(k, v, self._handle, self._nan_like(key_states))

    def _nan_like(self, x: Tensor) -> Tensor:
        """Return NaN without axes, made once: a tensor from inference mode cannot be used outside it."""
        old = self._unread
        if old is None or (old.dtype, old.device) != (x.dtype, x.device) or not is_writable(old):
            old = self._unread = x.new_full((), torch.nan)
        return old

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys of the next step, and the position of the first key if all keys were the latest."""
        new = query_length.numel() if isinstance(query_length, Tensor) else query_length
        return self.store.num_slots + new, self.store.seen - self.store.num_slots

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, from which positions are computed."""
        return self.store.seen

    def get_max_length(self) -> int:
        """Return -1: the length is not limited."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: the length is not limited; the name in older versions of transformers."""
        return -1

    def reset(self) -> None:
        """Remove all keys."""
        self.inner = self._maker.make(None if self._previous is None else self._previous.inner)
        self.store, self._handle, self._text, self.is_initialized = self._maker.watched(self.inner), None, 0, False
        self._told = NOTHING_TOLD

    def begin_at(self, text: int) -> None:
        """Continue from the restored state of the store.

        Args:
            text: tokens of the longest row so far.
        """
        self._handle, self._text, self._told, self.is_initialized = None, text, NOTHING_TOLD, True

    def _length(self) -> int:
        """Count the tokens of the longest row, without the padding that attention has reported."""
        return self._text if self._handle is None else self._handle.text

    def _heard(self) -> PaddingSoFar:
        """Return the padding that attention has reported so far."""
        return self._told if self._handle is None else self._handle.told

    def _insist_read(self) -> None:
        """Check that attention read the previous keys through their handle."""
        if self._handle is not None and not self._handle.collected:
            raise ValueError(
                "the keys of a compressed cache did not reach attention unchanged, so their weights were lost: if the model "
                "does not use hyperattention's attention, generate inside `with use(model, method):`; if the model changes "
                f"its keys after the cache, {type(self).__name__} does not support it: use transformers' DynamicCache"
            )

    def _end_step(self) -> None:
        self._insist_read()
        if self._handle is not None:
            self._handle.finish()

    def _take_rows(self, index: Tensor) -> None:
        self._end_step()
        told = self._heard().rows(index)
        self.store.take_rows(index)
        self._go_on(self._length(), told)

    def _go_on(self, text: int, told: PaddingSoFar) -> None:
        self.begin_at(text)
        self._told = told

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch for beam search."""
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.is_initialized:
            self._take_rows(torch.arange(self._batch(), dtype=torch.int64, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        if self.is_initialized:
            self._take_rows(torch.arange(self._batch(), dtype=torch.int64, device="cpu")[indices.cpu()])

    def _batch(self) -> int:
        return self.store.batch

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the latest tokens.

        Args:
            tokens_to_remove: the negative number of tokens to remove; a positive number is the length to keep, as in
                versions before 5.16. Some versions pass a tensor with one element.
        """
        size = int(tokens_to_remove)
        num = -size if size <= 0 else max(0, self.store.seen - size)
        if num:
            self._end_step()
            self.store.crop(num)
            self._go_on(self._length() - num, self._heard().without(num))
