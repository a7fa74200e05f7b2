"""Reading a model's mask: which new and earlier tokens of a step are padding, and whether other tokens are hidden."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

_REMEDY = "give a 2-D mask of 0 and 1, or use transformers' DynamicCache"


@dataclass(frozen=True)
class PaddingMask:
    """The information of a mask.

    Args:
        live: True for new tokens that are not padding; None if no new token is padding.
        old: True for earlier tokens that the new tokens see, the latest last; None if the mask does not list them.
        only_padding: whether the mask hides only padding and, from each token, later tokens.
    """

    live: Bool[Tensor, "rows new"] | None = None
    old: Bool[Tensor, "rows old"] | None = None
    only_padding: bool = True


def read_shown(mask: Shaped[Tensor, "..."] | None, new: int) -> PaddingMask:
    """Read a mask.

    Args:
        mask: None; boolean ``[rows, keys]``, causal; integer ``[rows, tokens]``, the numbers of packed documents; or
            ``[rows, heads, queries, keys]``, boolean or added to the scores, with one query for all tokens or one for each.
        new: number of new tokens; they are the last keys.

    Returns:
        the information of the mask.

    Raises:
        ValueError: if the mask has another shape, or does not define whether a token is padding.
    """
    if mask is None:
        return PaddingMask()
    if mask.ndim == 2 and mask.dtype != torch.bool:
        return PaddingMask(only_padding=False)
    readable = mask.ndim == 2 or (mask.ndim == 4 and mask.shape[2] in (1, new))
    if not readable or mask.shape[-1] < new or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} and {mask.dtype} for {new} new tokens: a compressed cache reads boolean "
            f"[batch, keys], and [batch, heads, queries, keys], boolean or added to the scores, for 1 or {new} queries; "
            f"{_REMEDY}"
        )
    if mask.ndim == 2:
        return PaddingMask(mask[:, -new:], mask[:, :-new])
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    alike = mask.dtype == torch.bool or bool((mask.masked_fill(~visible, 0) == 0).all())
    alike = alike and bool((visible == visible[:, :1]).all())
    # a token is visible if any head sees it
    visible = visible.any(1)  # [rows, queries, keys]
    old, own = visible[:, :, :-new], visible[:, :, -new:]
    if visible.shape[1] == 1:
        return PaddingMask(own[:, 0], old[:, 0], alike and new == 1)
    return _read_square(old, own, alike)


def _read_square(old: Tensor, own: Tensor, alike: bool) -> PaddingMask:
    """Read the tokens that each of several new tokens sees: ``[rows, new, old]`` and ``[rows, new, new]``."""
    live = own.diagonal(dim1=1, dim2=2)
    seeing = own & live[:, :, None]  # the mask of a padding token carries no information
    later = seeing.tril(-1).any(1)
    last = live & (live.flip(1).cumsum(1).flip(1) == 1)
    unclear = (own.any(1) & ~live) | (live & ~later & ~last)
    if bool(unclear.any()):
        row, token = (int(place) for place in unclear.nonzero()[0])
        raise ValueError(
            f"a mask does not give whether new token {token} of row {row} is padding: the token sees itself and no later "
            f"token sees it, or the reverse; {_REMEDY}"
        )
    padding_alone = live[:, None] & live[:, :, None] & torch.ones_like(own[0]).tril()
    union = (old & live[:, :, None]).any(1)
    whole = (seeing == padding_alone).all() & (~live[:, :, None] | (old == union[:, None])).all()
    # a row that contains only padding carries no information on earlier tokens
    return PaddingMask(live, union if bool(live.any(1).all()) else None, alike and bool(whole))


@dataclass(frozen=True)
class PaddingSoFar:
    """The known padding among the latest tokens.

    Args:
        num: number of the latest tokens whose padding is known; it is unknown for older tokens.
        live: True for those tokens that are not padding; None if none of them is padding.
    """

    num: int = 0
    live: Bool[Tensor, "batch num"] | None = None

    def followed_by(self, new: int, live: Tensor | None, batch: int) -> "PaddingSoFar":
        """Append new tokens.

        Args:
            new: number of new tokens.
            live: True for new tokens that are not padding; None if none is padding.
            batch: rows of the batch.

        Returns:
            the padding of the earlier and the new tokens.
        """
        known = next((x for x in (self.live, live) if x is not None), None)
        if known is None:
            return PaddingSoFar(self.num + new)
        before = known.new_ones(batch, self.num) if self.live is None else self.live
        after = known.new_ones(batch, new) if live is None else live.expand(batch, new)
        return PaddingSoFar(self.num + new, torch.cat([before, after.to(before.device)], 1))

    def without(self, num: int) -> "PaddingSoFar":
        """Remove the latest tokens.

        Args:
            num: number of tokens to remove.

        Returns:
            the padding of the remaining tokens.
        """
        left = max(0, self.num - num)
        return PaddingSoFar(left, None if self.live is None else self.live[:, :left])

    def rows(self, index: Tensor) -> "PaddingSoFar":
        """Select rows of the batch.

        Args:
            index: the numbers of the rows.

        Returns:
            the padding of these rows.
        """
        return PaddingSoFar(self.num, None if self.live is None else self.live.index_select(0, index.to(self.live.device)))

    def check(self, old: Tensor | None, num: int, whole: bool) -> None:
        """Check that a mask agrees with earlier masks on the padding of earlier tokens.

        Args:
            old: True for earlier tokens that the mask shows, the latest last; None if the mask shows all.
            num: number of earlier tokens in this step.
            whole: whether the store holds every key, so that attention can hide a token that was visible before.

        Raises:
            ValueError: if the mask shows a token that was padding, or hides a token that can no longer be hidden.
        """
        num = min(self.num, num if old is None else old.shape[1])
        like = self.live if old is None else old
        if like is None or not num:
            return
        every = like.new_ones(1, num)
        then = every if self.live is None else self.live[:, -num:]
        now = every if old is None else old[:, -num:].to(then.device)
        if bool((now & ~then).any()):
            raise ValueError(
                "a mask shows tokens that were padding when they were read, and whose keys were dropped: give the mask of "
                "all tokens, padding included, in every step"
            )
        if not whole and bool((then & ~now).any()):
            raise ValueError(f"a mask hides tokens that were read, but a compressed cache can hide only padding: {_REMEDY}")


NOTHING_TOLD = PaddingSoFar()
