"""Buffers that the steps of a call share: page faults of new ones would cost a quarter of its time."""

from dataclasses import dataclass, field
from math import prod

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
    # in the shapes asked for: a view takes as long as a dozen look-ups
    _views: dict[tuple, Tensor] = field(default_factory=dict)

    def take(self, name: str, *shape: int) -> Tensor:
        """Return the buffer of this name, in this shape; what it holds is lost.

        Args:
            name: what it holds.
            shape: of the result.

        Returns:
            memory without gaps.
        """
        found = self._views.get((name, shape))
        if found is None:
            size, held = prod(shape), self._held.get(name)
            if held is None or held.numel() < size:
                held = self._held[name] = torch.empty(size, dtype=self.dtype, device=self.device)
                for key in [key for key in self._views if key[0] == name]:
                    del self._views[key]
            found = self._views[name, shape] = held[:size].view(shape)
        return found

    def stairs(self, size: int, falling: bool) -> Tensor:
        """Return ones on the diagonal and above it, or below it, and zeros elsewhere, ``[1, size, size]``."""
        name = f"stairs, falling {falling}"
        known = (name, (1, size, size)) in self._views
        result = self.take(name, 1, size, size)
        # `triu_` of all pairs of a step takes five times as long as their product with this
        if not known:
            result.fill_(1.0)
            result.tril_() if falling else result.triu_()
        return result
