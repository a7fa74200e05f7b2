"""How keys travel from a compressed cache to attention with their weights, and how they are read there."""

from typing import Any

import torch
from torch import Tensor

from hyperattention.cache.store import Store

# set on attention functions that read what is held through its handle
READS_HELD = "_hyperattention_reads_held"
_HANDLE = "_hyperattention_handle"


class Handle:
    """The road from a cache to attention: it rides on the very tensor of keys that the cache hands out.

    Args:
        store: whose keys they are.
        new: how many of them were appended in this step.
        before: tokens of the longest row before it, padding not counted.
        limit: most there may be; None for no limit.
    """

    def __init__(self, store: Store, new: int, before: int, limit: int | None) -> None:
        """Wait to be collected."""
        self.store, self.new, self.collected = store, new, False
        self.text, self._before, self._limit = before + new, before, limit

    def check(self, mask: Tensor | None, extras: dict[str, Any], dropout: float) -> None:
        """Refuse what attention over a compressed cache cannot follow.

        Args:
            mask: as the model built it.
            extras: further arguments that change the result.
            dropout: probability of dropping a weight.

        Raises:
            ValueError: naming it.
        """
        if self.store.is_whole:
            return
        if extras:
            raise ValueError(f"a compressed cache cannot be read with {sorted(extras)}: use transformers' DynamicCache")
        if dropout > 0:
            raise ValueError(f"dropout={dropout} over a compressed cache: call model.eval() first")
        dense = mask is not None and mask.ndim == 4 and mask.shape[2] > 1
        packed = mask is not None and mask.ndim == 2 and mask.dtype != torch.bool
        if dense or packed:
            shape = None if mask is None else tuple(mask.shape)
            raise ValueError(
                f"a mask of shape {shape} over a compressed cache, whose keys are not all there: only padding can be"
            )

    def mark(self, mask: Tensor | None) -> None:
        """Tell the store which of the new tokens are padding.

        Args:
            mask: as the model built it: None, 2-D bool as wide as the keys, or 4-D.

        Raises:
            ValueError: if the text is longer than the model was made for.
        """
        self._mark(mask)
        # assisted decoding guesses further than it goes: of a later step the first token counts
        reach = self._before + 1 if self._before else self.text
        if self._limit is not None and reach > self._limit:
            raise ValueError(
                f"a text of {reach:,} tokens, and the model was made for {self._limit:,}: give a shorter one, fewer new "
                "tokens, or beyond=True to go on all the same"
            )

    def _mark(self, mask: Tensor | None) -> None:
        if mask is None or (mask.ndim == 2 and mask.dtype != torch.bool):
            return
        if mask.ndim == 2:
            live = mask[:, -self.new :]
        else:
            # padding is a token that does not see itself
            seen = mask[:, 0, -self.new :, -self.new :].diagonal(dim1=-2, dim2=-1)
            live = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        self.store.mark(live)
        if self._limit is not None:
            self.text = self._before + int(live.sum(-1).max())


def attach(keys: Tensor, handle: Handle) -> Tensor:
    """Let a handle ride on keys.

    Args:
        keys: what the cache hands out.
        handle: the handle.

    Returns:
        the keys, as a tensor of their own.
    """
    keys = keys.view(keys.shape)
    setattr(keys, _HANDLE, handle)
    return keys


def handle_of(keys: Tensor) -> Handle | None:
    """Find the handle that rides on keys, and note that it was collected.

    Args:
        keys: what attention was given.

    Returns:
        the handle; None for keys of another cache, or of none.
    """
    handle = getattr(keys, _HANDLE, None)
    if handle is not None:
        handle.collected = True
    return handle
