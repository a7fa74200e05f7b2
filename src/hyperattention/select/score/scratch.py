"""Memory that is lent again and again: on a CPU fresh memory costs more in page faults than the arithmetic done in it."""

from math import prod

from torch import Tensor


class Scratch:
    """One buffer, lent whole or in part; what it held before is lost with each call.

    Args:
        like: a tensor of the dtype and device wanted.
        room: numbers it holds at first; it grows to the largest request, which costs fresh memory each time.
    """

    def __init__(self, like: Tensor, room: int) -> None:
        self.like = like.new_empty(0)
        self._buffer = like.new_empty(room)

    def take(self, *shape: int) -> Tensor:
        """Lend a tensor of this shape, with anything in it."""
        size = prod(shape)
        if size > self._buffer.numel():
            self._buffer = self._buffer.new_empty(size)
        return self._buffer[:size].view(shape)
