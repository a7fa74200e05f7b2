"""Random inputs of the tests: seeded, tiny, and with scores spread widely enough for the choice of keys to matter."""

import torch
from torch import Tensor

from hyperattention.problem import Problem


def tensors(
    num_queries: int,
    num_keys: int | None = None,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 2,
    head_dim: int = 8,
    value_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; as many keys as queries unless told."""
    num_keys = num_queries if num_keys is None else num_keys
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads, num_queries, head_dim),
        (batch, kv_heads, num_keys, head_dim),
        (batch, kv_heads, num_keys, value_dim),
    )
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    # keys share a direction, as those of language models do
    return (1.5 * q).to(dtype), (1.5 * k + 1).to(dtype), v.to(dtype)


def problem(num_tokens: int, *, causal: bool = True, seed: int = 0, **shape) -> Problem:
    """One self-attention problem in normal form."""
    q, k, v = tensors(num_tokens, **shape)
    return Problem(q, k, v, q.shape[-1] ** -0.5, causal=causal, seed=seed)
