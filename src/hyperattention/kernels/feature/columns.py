"""Numbers of each token in two parts, a matrix and one more number: values and a one, slopes and a last slope."""

from dataclasses import dataclass

import torch
from torch import Tensor

# columns of values are padded with zeros to a multiple of this: a product as wide as 65 takes longer than one of 80
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
        return self.main.shape[2] if self.last is None else -(-self.width // MULTIPLE) * MULTIPLE

    def ordered(self, order: Tensor) -> "Columns":
        """Put the tokens of all lists into another order."""
        return Columns(self.main.index_select(1, order), None if self.last is None else self.last.index_select(1, order))

    def together(self, dtype: torch.dtype) -> Tensor:
        """Return all numbers and the zeros of the padding, ``[lists, tokens, padded]``; of a matrix alone no copy."""
        if self.last is None:
            return self.main.to(dtype)
        result = self.last.new_empty(*self.last.shape, self.padded, dtype=dtype)
        self._fill(result)
        return result

    def upright(self, blocks: int, padded: int, dtype: torch.dtype) -> Tensor:
        """Return numbers by number, then by token, in blocks of tokens: ``[lists * blocks, padded, tokens of a block]``."""
        lists, tokens = self.main.shape[:2]
        result = self.main.new_empty(lists, blocks, padded, tokens // blocks, dtype=dtype)
        self._fill(result.transpose(2, 3), blocks)
        return result.flatten(0, 1)

    def _fill(self, result: Tensor, blocks: int | None = None) -> None:
        """Copy all numbers to the first columns, and zeros to the others."""
        main, last = (x if blocks is None or x is None else x.unflatten(1, (blocks, -1)) for x in (self.main, self.last))
        assert main is not None
        result[..., : main.shape[-1]] = main
        if last is not None:
            result[..., main.shape[-1]] = last
        if result.shape[-1] > self.width:
            result[..., self.width :] = 0
