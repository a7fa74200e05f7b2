"""Numbers of each token in two parts, a matrix and one more number: values and a one, slopes and a last slope."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.kernels.feature.workspace import Workspace

# columns of values are padded to a multiple of this: a product as wide as 65 takes longer than one of 80
MULTIPLE = 16


@dataclass(frozen=True)
class Columns:
    """Numbers of each token.

    Args:
        main: ``[lists, tokens, width]``.
        last: one more number of each token, ``[lists, tokens]``; None for none.
    """

    main: Tensor
    last: Tensor | None = None

    def __getitem__(self, index) -> "Columns":
        """Select some tokens of some lists."""
        return Columns(self.main[index], None if self.last is None else self.last[index])

    @property
    def width(self) -> int:
        """Count the numbers of a token."""
        return self.main.shape[2] + (self.last is not None)

    @property
    def padded(self) -> int:
        """Count the columns of `together`."""
        return -(-self.width // MULTIPLE) * MULTIPLE

    def ordered(self, order: Tensor) -> "Columns":
        """Put the tokens of all lists into another order."""
        return Columns(self.main.index_select(1, order), None if self.last is None else self.last.index_select(1, order))

    def together(self, scale: Tensor | None, blocks: int, work: Workspace) -> Tensor:
        """Return all numbers times a scale of each token, in blocks of tokens: ``[blocks * lists, tokens of one, padded]``.

        Args:
            scale: ``[lists, tokens]``; None for 1.
            blocks: number of blocks.
            work: the memory of the result.

        Returns:
            the numbers; columns of the padding hold anything, and nothing may read what becomes of them.
        """
        (lists, tokens), width = self.main.shape[:2], self.main.shape[2]
        result = work.take("value", blocks, lists, tokens // blocks, self.padded)
        # once is enough: nothing reads it, but numbers that are no normal ones would be slow
        work.once(("padding", result.data_ptr(), result.shape), lambda: result[..., self.width :].zero_())
        last = None if self.last is None else self.last.unsqueeze(2)
        scale = None if scale is None else by_block(scale.unsqueeze(2), blocks)
        for x, place in ((self.main, slice(width)), (last, slice(width, self.width))):
            if x is not None:
                x, part = by_block(x, blocks), result[..., place]
                part.copy_(x) if scale is None else torch.mul(x, scale, out=part)
        return work.take("value", blocks * lists, tokens // blocks, self.padded)

    def lying(self, name: str, work: Workspace) -> Tensor:
        """Return numbers by token, in the dtype of sums, ``[lists, tokens, width]``; of a matrix alone no copy.

        Args:
            name: of the buffer.
            work: the memory of the result.

        Returns:
            the numbers.
        """
        if self.last is None and self.main.dtype == work.dtype:
            return self.main
        result = work.take(name, *self.main.shape[:2], self.width)
        result[..., : self.main.shape[2]] = self.main
        if self.last is not None:
            result[..., -1] = self.last
        return result

    def upright(self, blocks: int, padded: int, name: str, work: Workspace) -> Tensor:
        """Return numbers by number, then by token, in blocks of tokens: ``[blocks * lists, padded, tokens of a block]``.

        Args:
            blocks: number of blocks.
            padded: numbers of a token in the result; zeros where there are fewer.
            name: of the buffer.
            work: the memory of the result.

        Returns:
            the numbers.
        """
        (lists, tokens), width = self.main.shape[:2], self.main.shape[2]
        result = work.take(name, blocks, lists, padded, tokens // blocks)
        result[:, :, :width] = by_block(self.main, blocks).transpose(2, 3)
        if self.last is not None:
            result[:, :, width] = by_block(self.last.unsqueeze(2), blocks)[..., 0]
        if padded > self.width:
            result[:, :, self.width :] = 0
        return work.take(name, blocks * lists, padded, tokens // blocks)


def by_block(x: Tensor, blocks: int) -> Tensor:
    """View an axis of tokens as blocks: ``[lists, tokens, ...]`` as ``[blocks, lists, tokens of one, ...]``."""
    lists, tokens, width = x.shape
    return x.view(lists, blocks, tokens // blocks, width).transpose(0, 1)
