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

    def take(self, name: str, *shape: int) -> Tensor:
        """Return the buffer of this name, in this shape; what it holds is lost.

        Args:
            name: what it holds.
            shape: of the result.

        Returns:
            memory without gaps.
        """
        size, held = prod(shape), self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return held[:size].view(shape)

    def cast(self, name: str, x: Tensor) -> Tensor:
        """Return numbers in the dtype of sums; those that are in it already are not copied."""
        return x if x.dtype == self.dtype else self.take(name, *x.shape).copy_(x)
