"""Rotary positions: queries and keys turned by angles that grow with their positions."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotate(
    x: Float[Tensor, "batch heads tokens head_dim"], first: int, base: float
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Turn pairs of coordinates, the first half with the second half, by position * base^(-2i / head_dim).

    Source: Su et al., 2021 (arXiv:2104.09864).   Differs: halves are paired, as in most models, not neighbours.

    Args:
        x: queries or keys; head_dim must be even.
        first: position of the first token.
        base: base of the wave lengths.

    Returns:
        the turned vectors, in the dtype of `x`.
    """
    half = x.shape[-1] // 2
    # positions and angles in float64: float32 is wrong by a hundredth of a turn at a million tokens
    rate = base ** -(torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = torch.arange(first, first + x.shape[2], device=x.device, dtype=torch.float64)[:, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
