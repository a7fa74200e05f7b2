"""What a model's mask says of the new tokens of a step, and of those before: which are padding, and what else it hides."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

_REMEDY = "give a 2-D mask of 0 and 1, or use transformers' DynamicCache"


@dataclass(frozen=True)
class PaddingMask:
    """A mask, read.

    Args:
        live: which of the new tokens are no padding; None where none is.
        old: which of the tokens before a new token sees, the latest last; None where the mask does not list them.
        only_padding: whether it hides nothing but padding and, from each token, later ones.
    """

    live: Bool[Tensor, "rows new"] | None = None
    old: Bool[Tensor, "rows old"] | None = None
    only_padding: bool = True


def read_shown(mask: Shaped[Tensor, "..."] | None, new: int) -> PaddingMask:
    """Read a mask.

    Args:
        mask: None; boolean ``[rows, keys]``, causal; integer ``[rows, tokens]``, the numbers of packed documents; or
            ``[rows, heads, queries, keys]``, boolean or added to the scores, with one query for all or one for each.
        new: how many tokens are new; they are the last keys.

    Returns:
        what it says.

    Raises:
        ValueError: if the mask has another shape, or does not give whether a token is padding.
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
    # a token is there if any head sees it
    visible = visible.any(1)  # [rows, queries, keys]
    old, own = visible[:, :, :-new], visible[:, :, -new:]
    if visible.shape[1] == 1:
        return PaddingMask(own[:, 0], old[:, 0], alike and new == 1)
    return _read_square(old, own, alike)


def _read_square(old: Tensor, own: Tensor, alike: bool) -> PaddingMask:
    """Read what each of several new tokens sees: ``[rows, new, old]`` and ``[rows, new, new]``."""
    live = own.diagonal(dim1=1, dim2=2)
    seeing = own & live[:, :, None]  # what padding would see says nothing
    later = seeing.tril(-1).any(1)
    last = live & (live.flip(1).cumsum(1).flip(1) == 1)
    unclear = (own.any(1) & ~live) | (live & ~later & ~last)
    if bool(unclear.any()):
        row, token = (int(place) for place in unclear.nonzero()[0])
        raise ValueError(
            f"a mask does not give whether new token {token} of row {row} is padding: it sees itself and no later token "
            f"sees it, or the reverse; {_REMEDY}"
        )
    padding_alone = live[:, None] & live[:, :, None] & torch.ones_like(own[0]).tril()
    union = (old & live[:, :, None]).any(1)
    whole = (seeing == padding_alone).all() & (~live[:, :, None] | (old == union[:, None])).all()
    # a row of padding alone says nothing of what came before
    return PaddingMask(live, union if bool(live.any(1).all()) else None, alike and bool(whole))


@dataclass(frozen=True)
class PaddingSoFar:
    """What was said so far of the latest tokens.

    Args:
        num: of how many; what is older is not known.
        live: which of them are no padding; None where none is.
    """

    num: int = 0
    live: Bool[Tensor, "batch num"] | None = None

    def followed_by(self, new: int, live: Tensor | None, batch: int) -> "PaddingSoFar":
        """Add what is said of new tokens.

        Args:
            new: how many.
            live: which are no padding; None for all.
            batch: rows of the batch.

        Returns:
            both together.
        """
        known = next((x for x in (self.live, live) if x is not None), None)
        if known is None:
            return PaddingSoFar(self.num + new)
        before = known.new_ones(batch, self.num) if self.live is None else self.live
        after = known.new_ones(batch, new) if live is None else live.expand(batch, new)
        return PaddingSoFar(self.num + new, torch.cat([before, after.to(before.device)], 1))

    def without(self, num: int) -> "PaddingSoFar":
        """Forget the latest.

        Args:
            num: how many.

        Returns:
            what is left.
        """
        left = max(0, self.num - num)
        return PaddingSoFar(left, None if self.live is None else self.live[:, :left])

    def rows(self, index: Tensor) -> "PaddingSoFar":
        """Copy rows of the batch.

        Args:
            index: which.

        Returns:
            what was said of them.
        """
        return PaddingSoFar(self.num, None if self.live is None else self.live.index_select(0, index.to(self.live.device)))

    def check(self, old: Tensor | None, num: int, whole: bool) -> None:
        """Insist that a mask says of the tokens before what was said of them when they were read.

        Args:
            old: what it says of them, the latest last; None if it shows all.
            num: how many the step at hand shows.
            whole: whether attention honours the mask, so that it may hide what it showed before.

        Raises:
            ValueError: if it shows padding, or hides what can be hidden no more.
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
                "a mask shows tokens that were padding when they were read, whose keys are gone: give the mask of all "
                "tokens, padding included, in every step"
            )
        if not whole and bool((then & ~now).any()):
            raise ValueError(f"a mask hides tokens that were read, and a compressed cache hides only padding: {_REMEDY}")


NOTHING_TOLD = PaddingSoFar()
