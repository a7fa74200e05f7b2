"""How keys travel from a compressed cache to attention with their weights, and how they are read there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hyperattention.cache.score_rule import ScoreRule
from hyperattention.cache.store import Store
from hyperattention.integrations.transformers.cache_padding import NOTHING_TOLD, PaddingMask, PaddingSoFar, read_shown

# set on attention functions that read what is held through its handle
READS_HELD = "_hyperattention_reads_held"
_HANDLE = "_hyperattention_handle"

# what models do to scores that attention over a compressed cache does as well
_FOLLOWED = frozenset({"softcap", "s_aux"})


class Handle:
    """The road from a cache to attention: it rides on the very tensors of keys and values that the cache hands out.

    Args:
        store: whose keys they are.
        new: how many of them were appended in this step.
        before: tokens of the longest row before it, padding not counted.
        limit: most there may be; None for no limit.
        told: what was said of tokens before.
        readers: how many attention calls of a step read these keys.
    """

    def __init__(
        self, store: Store, new: int, before: int, limit: int | None, told: PaddingSoFar = NOTHING_TOLD, readers: int = 1
    ) -> None:
        """Wait to be collected."""
        self.store, self.new, self.collected = store, new, False
        self.text, self.told = before + new, told.followed_by(new, None, store.batch)
        self._before, self._limit, self._told = before, limit, told
        self._left = readers
        self._own_call: tuple[Tensor, float, ScoreRule] | None = None

    def check(
        self, value: Tensor, mask: Tensor | None, causal: bool, extras: Mapping[str, Any], dropout: float
    ) -> ScoreRule:
        """Refuse what attention over a compressed cache cannot follow, and tell the store which new tokens are padding.

        What a model does in every step is refused in its first, before there is a text to lose.

        Args:
            value: the values that attention was given.
            mask: as the model built it.
            causal: whether a query is kept from later keys where the mask does not say.
            extras: further arguments that change the result.
            dropout: probability of dropping a weight.

        Returns:
            what the model does to scores beside their scale.

        Raises:
            ValueError: naming it, or if the text is longer than the model was made for.
        """
        if getattr(value, _HANDLE, None) is not self:
            raise ValueError(
                "the model changed the values between its cache and its attention, so that a compressed cache cannot serve "
                f"it: attention was given values of shape {tuple(value.shape)}; use transformers' DynamicCache"
            )
        if unknown := sorted(extras.keys() - _FOLLOWED):
            raise ValueError(f"a compressed cache cannot be read with {unknown}: use transformers' DynamicCache")
        whole = self.store.is_whole
        if not self._left:
            raise ValueError(
                "more attention calls read the keys of a layer than its model's configuration names, which a compressed "
                "cache cannot follow: use transformers' DynamicCache"
            )
        if dropout > 0 and not whole:
            raise ValueError(f"dropout={dropout} over a compressed cache: call model.eval() first")
        shown = read_shown(mask, self.new)
        backwards = mask is None and self.new > 1 and not causal
        if not whole and (backwards or not shown.only_padding):
            what = "attention to later tokens" if mask is None else f"a mask of shape {tuple(mask.shape)}"
            raise ValueError(f"{what} over a compressed cache, whose keys are not all there: only padding can be hidden")
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
        # assisted decoding guesses further than it goes: of a later step the first token counts
        reach = self._before + 1 if self._before else self.text
        if self._limit is not None and reach > self._limit:
            raise ValueError(
                f"a text of {reach:,} tokens, and the model was made for {self._limit:,}: give a shorter one, fewer new "
                "tokens, or allow_longer=True to go on all the same"
            )

    def attend(self, q: Tensor, scale: float, rule: ScoreRule) -> Tensor:
        """Attend to what is held, and end the step.

        Args:
            q: the queries.
            scale: factor of the scores.
            rule: what the model does to scores beside.

        Returns:
            the rows, in the type of the queries.
        """
        out = self.store.attend(q, scale, rule).out.to(q.dtype)
        self.end_step(q, scale, rule)
        return out

    def end_step(self, q: Tensor, scale: float, rule: ScoreRule) -> None:
        """End the step with the last call that reads its keys; the queries of the first are the layer's own.

        Args:
            q: the queries.
            scale: factor of the scores.
            rule: what the model does to scores beside.
        """
        self._own_call = self._own_call or (q, scale, rule)
        self._left -= 1
        if not self._left:
            self.finish()

    def finish(self) -> None:
        """End the step, if it has not ended."""
        if self._own_call is not None:
            self.store.end_step(*self._own_call)
        self._left, self._own_call = 0, None


def attach(keys: Tensor, values: Tensor, handle: Handle) -> tuple[Tensor, Tensor]:
    """Let a handle ride on keys and values.

    Args:
        keys: what the cache hands out.
        values: likewise.
        handle: the handle.

    Returns:
        both, as tensors of their own. Where the store does not hold every key, they are of NaN: attention reads through the
        handle, and whatever does not must not go on unnoticed.
    """
    if not handle.store.is_whole:
        keys, values = (x.new_full((), torch.nan).expand(x.shape) for x in (keys, values))
    keys, values = keys.view(keys.shape), values.view(values.shape)
    for each in (keys, values):
        setattr(each, _HANDLE, handle)
    return keys, values


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
