"""One layer of a compressed cache: what transformers asks of a layer, answered by a store."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hyperattention.cache.store_maker import StoreMaker
from hyperattention.integrations.transformers.cache_handle import Handle, attach
from hyperattention.integrations.transformers.cache_padding import NOTHING_TOLD, PaddingSoFar


class HyperCacheLayer(CacheLayerMixin):
    """One layer of a `HyperCache`.

    Args:
        maker: makes its stores.
        previous: the layer before, which is held so that copies of a cache find their own.
        limit: most tokens of a text, padding not counted; None for no limit.
        readers: layers whose attention reads its keys, itself included.
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
        """Start empty."""
        super().__init__()
        self._maker, self._previous, self._limit, self._readers = maker, previous, limit, readers
        # what the next layer may share, and what is read, which may watch over it
        self.inner = maker.make(None if previous is None else previous.inner)
        self.store = maker.watched(self.inner)
        self._handle: Handle | None = None
        self._told: PaddingSoFar = NOTHING_TOLD
        self._token_bytes = self._text = 0

    @property
    def whole_bytes(self) -> int:
        """Bytes of the keys and values of every token seen, had all been kept; 0 before any came by."""
        return self._token_bytes * self.store.seen * self.store.batch

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note that something is held; stores make their own room."""
        # some models look at how long these are; what is held is the store's alone
        self.keys, self.values, self.is_initialized = key_states.new_empty(0), value_states.new_empty(0), True

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
        self._end_step()
        # it has attended by now: a model that cannot be served is told so before it has read its text
        if self._previous is not None:
            self._previous._insist_read()
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError("a compressed cache has no gradient: use torch.no_grad(), or use_cache=False")
        self.lazy_initialization(key_states, value_states)
        self._token_bytes = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (key_states, value_states))
        if self.store.device not in (None, key_states.device):
            self.store.move(key_states.device)
        k, v = self.store.append(key_states, value_states)
        self._text, self._told = self._length(), self._heard()
        self._handle = Handle(self.store, key_states.shape[2], self._text, self._limit, self._told, self._readers)
        return attach(k, v, self._handle)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next step is shown, and the position that the first would have if all were recent."""
        new = query_length.numel() if isinstance(query_length, Tensor) else query_length
        return self.store.num_slots + new, self.store.seen - self.store.num_slots

    def get_seq_length(self) -> int:
        """Return the true length, from which positions follow."""
        return self.store.seen

    def get_max_length(self) -> int:
        """Say that there is no longest text."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Say the same to older versions."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.inner = self._maker.make(None if self._previous is None else self._previous.inner)
        self.store, self._handle, self._text, self.is_initialized = self._maker.watched(self.inner), None, 0, False
        self._told = NOTHING_TOLD

    def begin_at(self, text: int) -> None:
        """Go on from what the store was given.

        Args:
            text: tokens of the longest row so far.
        """
        self._handle, self._text, self._told, self.is_initialized = None, text, NOTHING_TOLD, True

    def _length(self) -> int:
        """Count the tokens of the longest row, padding left out as attention told."""
        return self._text if self._handle is None else self._handle.text

    def _heard(self) -> PaddingSoFar:
        """Give what attention has told of the tokens so far."""
        return self._told if self._handle is None else self._handle.told

    def _insist_read(self) -> None:
        """Insist that what was handed out last was read through its handle."""
        if self._handle is not None and not self._handle.collected:
            raise ValueError(
                "the keys of a compressed cache did not reach attention as they were handed out, so that their weights were "
                "lost: either attention is not hyperattention's, then generate inside `with use(model, method):`, or the "
                f"model changes its keys in between: {type(self).__name__} cannot serve it; use transformers' DynamicCache"
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
        """Follow the beams."""
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
        """Forget the latest tokens.

        Args:
            tokens_to_remove: their number, negative; positive for the length to keep, as versions before 5.16 say it. Some
                versions give a tensor of one.
        """
        size = int(tokens_to_remove)
        num = -size if size <= 0 else max(0, self.store.seen - size)
        if num:
            self._end_step()
            self.store.crop(num)
            self._go_on(self._length() - num, self._heard().without(num))
