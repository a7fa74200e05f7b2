"""Memory that is lent again and again: on a CPU fresh memory costs more in page faults than the arithmetic done in it."""

from math import prod

from torch import Tensor


class Scratch:
    """One buffer, which grows to the largest size asked for; what it held before is lost with each call.

    Args:
        like: a tensor of the dtype and device wanted.
    """

    def __init__(self, like: Tensor) -> None:
        self._buffer = like.new_empty(0)

    def take(self, *shape: int) -> Tensor:
        """Lend a tensor of this shape, with anything in it."""
        size = prod(shape)
        if size > self._buffer.numel():
            self._buffer = self._buffer.new_empty(size)
        return self._buffer[:size].view(shape)
