"""Buffers that the steps of a call share: page faults of new ones would cost a quarter of its time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workspace:
    """Buffers of a call, by name; a step writes where the step before it did.

    Args:
        dtype: of all buffers, that of sums.
        device: of all buffers.
    """

    dtype: torch.dtype
    device: torch.device
    _held: dict[str, Tensor] = field(default_factory=dict)
    _made: dict[tuple, Any] = field(default_factory=dict)

    def take(self, name: str, *shape: int) -> Tensor:
        """Return the buffer of this name, in this shape; what it holds is anything.

        Args:
            name: what it holds.
            shape: of the result.

        Returns:
            memory without gaps.
        """
        found = self._made.get((name, shape))
        if found is None:
            size, held = prod(shape), self._held.get(name)
            if held is None or held.numel() < size:
                held = self._held[name] = torch.empty(size, dtype=self.dtype, device=self.device)
                for key in [key for key in self._made if key[0] == name]:
                    del self._made[key]
            found = self._made[name, shape] = held[:size].view(shape)
        return found

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Return what was made of buffers before: a view takes as long as a dozen look-ups.

        Args:
            key: what was made, with the addresses and the shapes of the buffers.
            make: makes it.

        Returns:
            the result of `make`.
        """
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found

    def stairs(self, size: int, falling: bool) -> Tensor:
        """Return ones on the diagonal and above it, or below it, and zeros elsewhere, ``[1, size, size]``."""

        def make() -> Tensor:
            ones = torch.ones(1, size, size, dtype=self.dtype, device=self.device)
            return ones.tril_() if falling else ones.triu_()

        # `triu_` of all pairs of a step takes five times as long as their product with this
        return self.once(("stairs", size, falling), make)
