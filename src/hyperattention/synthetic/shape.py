"""The sizes of synthetic inputs, and their checks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.random import SEED_LIMIT


@dataclass(frozen=True)
class Shape:
    """The checked sizes of synthetic inputs."""

    num_tokens: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    seed: int

    def __post_init__(self) -> None:
        sizes = (self.batch, self.heads, self.kv_heads, self.head_dim, self.value_dim)
        if self.num_tokens < 0 or min(sizes) < 1:
            raise ValueError(f"num_tokens={self.num_tokens} must be >= 0, and all other sizes >= 1; got {self}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}: choose a divisor")
        if not 0 <= self.seed < SEED_LIMIT:
            raise ValueError(f"seed={self.seed} must be in [0, 2**63): take it modulo 2**63")

    def empty(self, device: torch.device | str, dtype: torch.dtype) -> list[Tensor]:
        """Make tensors for queries, keys and values."""
        kinds = ((self.heads, self.head_dim), (self.kv_heads, self.head_dim), (self.kv_heads, self.value_dim))
        return [torch.empty(self.batch, h, self.num_tokens, d, device=device, dtype=dtype) for h, d in kinds]


def given(size: int | None, default: int) -> int:
    """Return a size, or what it is if none is given; a size of 0 must raise an error, and not become the default."""
    return default if size is None else size
