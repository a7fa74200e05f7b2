"""Reusable memory: on a CPU, page faults of new memory cost more time than the arithmetic done in it."""

from math import prod

from torch import Tensor


class Scratch:
    """One reusable buffer; each call overwrites the previous content.

    Args:
        like: a tensor of the dtype and device wanted.
        room: initial number of elements; the buffer grows to the largest request, with new memory each time.
    """

    def __init__(self, like: Tensor, room: int) -> None:
        self.like = like.new_empty(0)
        self._buffer = like.new_empty(room)

    def take(self, *shape: int) -> Tensor:
        """Return a tensor of this shape in the buffer, with undefined content."""
        size = prod(shape)
        if size > self._buffer.numel():
            # the smaller one goes first, so that both are never held
            self._buffer = self.like
            self._buffer = self.like.new_empty(size)
        return self._buffer[:size].view(shape)
