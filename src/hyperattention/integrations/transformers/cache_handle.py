"""The handle that connects attention with the store of a compressed cache, so that attention reads keys with weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hyperattention.cache.score_rule import ScoreRule
from hyperattention.cache.store import Store
from hyperattention.integrations.transformers.cache_padding import NOTHING_TOLD, PaddingMask, PaddingSoFar, read_shown

# set on attention functions that read a compressed cache through its handle
READS_HELD = "_hyperattention_reads_held"
_HANDLE = "_hyperattention_handle"

# score modifications of models that attention over a compressed cache supports
_FOLLOWED = frozenset({"softcap", "s_aux"})


class Handle:
    """The connection from a cache to attention, attached to the tensors of keys and values that the cache returns.

    Args:
        store: the store of the keys.
        new: number of keys appended in this step.
        before: tokens of the longest row before this step, padding not counted.
        limit: largest allowed number of tokens; None for no limit.
        told: which earlier tokens are padding.
        readers: number of attention calls in a step that read these keys.
    """

    def __init__(
        self, store: Store, new: int, before: int, limit: int | None, told: PaddingSoFar = NOTHING_TOLD, readers: int = 1
    ) -> None:
        """Make a handle that attention has not taken yet."""
        self.store, self.new, self.collected = store, new, False
        self.text, self.told = before + new, told.followed_by(new, None, store.batch)
        self._before, self._limit, self._told = before, limit, told
        self._left = readers
        self._own_call: tuple[Tensor, float, ScoreRule] | None = None

    def check(
        self, value: Tensor, mask: Tensor | None, causal: bool, extras: Mapping[str, Any], dropout: float
    ) -> ScoreRule:
        """Check the arguments of an attention call, and tell the store which new tokens are padding.

        An unsupported argument of every step is refused in the first step already, before any text is lost.

        Args:
            value: the values that attention received.
            mask: the mask that the model built.
            causal: whether later keys are hidden from a query if there is no mask.
            extras: further arguments that change the result.
            dropout: probability of dropping a weight.

        Returns:
            the model's modification of scores, beside their scale.

        Raises:
            ValueError: for an argument that attention over a compressed cache does not support, or a text longer than the
                model's trained length.
        """
        if getattr(value, _HANDLE, None) is not self:
            raise ValueError(
                "the model changed the values between its cache and its attention, which a compressed cache does not "
                f"support: attention received values of shape {tuple(value.shape)}; use transformers' DynamicCache"
            )
        if unknown := sorted(extras.keys() - _FOLLOWED):
            raise ValueError(f"a compressed cache does not support the arguments {unknown}: use transformers' DynamicCache")
        whole = self.store.is_whole
        if not self._left:
            raise ValueError(
                "more attention calls read the keys of a layer than the model's configuration declares, which a compressed "
                "cache does not support: use transformers' DynamicCache"
            )
        if dropout > 0 and not whole:
            raise ValueError(f"dropout={dropout} is not supported over a compressed cache: call model.eval() first")
        shown = read_shown(mask, self.new)
        backwards = mask is None and self.new > 1 and not causal
        if not whole and (backwards or not shown.only_padding):
            what = "attention to later tokens" if mask is None else f"a mask of shape {tuple(mask.shape)}"
            raise ValueError(
                f"{what} over a compressed cache that has dropped keys, where only padding can be hidden: give a 2-D "
                "padding mask, or use transformers' DynamicCache"
            )
        self._told.check(shown.old, self.store.num_slots - self.new, whole)
        self._mark(shown)
        return ScoreRule(extras.get("softcap"), extras.get("s_aux"))

    def _mark(self, shown: PaddingMask) -> None:
        if shown.live is not None:
            live = shown.live.expand(self.store.batch, self.new)
            self.store.mask_padding(live)
            self.told = self._told.followed_by(self.new, live, self.store.batch)
            if self._limit is not None:
                self.text = self._before + int(live.sum(-1).max())
        # in assisted decoding later tokens of a step may be removed again, so only the first one counts
        reach = self._before + 1 if self._before else self.text
        if self._limit is not None and reach > self._limit:
            raise ValueError(
                f"the text has {reach:,} tokens, but the model was made for {self._limit:,}: give a shorter text, "
                "fewer new tokens, or allow_longer=True to continue beyond that length"
            )

    def attend(self, q: Tensor, scale: float, rule: ScoreRule) -> Tensor:
        """Attend to the stored keys, and end the step.

        Args:
            q: the queries.
            scale: factor of the scores.
            rule: the model's modification of scores.

        Returns:
            the output rows, in the dtype of the queries.
        """
        out = self.store.attend(q, scale, rule).out.to(q.dtype)
        self.end_step(q, scale, rule)
        return out

    def end_step(self, q: Tensor, scale: float, rule: ScoreRule) -> None:
        """End the step after the last call that reads its keys; the store receives the queries of the first call.

        Args:
            q: the queries.
            scale: factor of the scores.
            rule: the model's modification of scores.
        """
        self._own_call = self._own_call or (q, scale, rule)
        self._left -= 1
        if not self._left:
            self.finish()

    def finish(self) -> None:
        """End the step if it has not ended yet."""
        if self._own_call is not None:
            self.store.end_step(*self._own_call)
        self._left, self._own_call = 0, None


def attach(keys: Tensor, values: Tensor, handle: Handle, unread: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attach a handle to keys and values.

    Args:
        keys: the keys that the cache returns.
        values: the values that the cache returns.
        handle: the handle.
        unread: NaN without axes on the device of the keys, to be used again; None to make one.

    Returns:
        new tensors of keys and values with the handle. If the store does not hold every key, both are filled with NaN:
        attention reads the keys through the handle, and any other use of the tensors gives NaN.
    """
    if not handle.store.is_whole:
        unread = keys.new_full((), torch.nan) if unread is None else unread
        keys, values = (unread.to(x.dtype).expand(x.shape) for x in (keys, values))
    keys, values = keys.view(keys.shape), values.view(values.shape)
    for each in (keys, values):
        setattr(each, _HANDLE, handle)
    return keys, values


def handle_of(keys: Tensor) -> Handle | None:
    """Return the handle that is attached to keys, and mark it as taken by attention.

    Args:
        keys: the keys that attention received.

    Returns:
        the handle; None for keys of another cache or without a cache.
    """
    handle = getattr(keys, _HANDLE, None)
    if handle is not None:
        handle.collected = True
    return handle
