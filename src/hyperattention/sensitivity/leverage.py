"""Leverage scores of keys, exact and sketched: their sensitivities for weights |q . k|^2."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.check import positive
from hyperattention.random import normal
from hyperattention.sensitivity.gram import squared_norms, whitened
from hyperattention.sensitivity.key_rows import key_rows

# counter after those of every draw, so that no other draw shares these bits
_STREAM = 11


def leverage(
    k: Float[Tensor, "lists keys head_dim"],
    total: Int[Tensor, "lists 1"] | None = None,
    ridge: float | int = 0.0,
    *,
    centred: bool = False,
) -> Float[Tensor, "lists keys"]:
    """Return the leverage score of each key: its squared norm in the inverse Gram matrix of all keys.

    tau_j = x_j' (X'X + lambda I)^-1 x_j = max_y (x_j . y)^2 / (sum_l (x_l . y)^2 + lambda |y|^2)

    The scores are at most 1 and add up to the rank of the keys, at most head_dim. Two passes over the keys, by Gram matrix
    and Cholesky factor, and one more without a ridge; memory beside the scores: the Gram matrix and a chunk of keys.
    Source: Kannan et al., 2024 (arXiv:2410.05462).   Differs: an optional ridge and centre.

    Args:
        k: keys, live keys first.
        total: number of live keys of each list; None for all.
        ridge: lambda relative to the mean square of a coordinate: lambda = ridge * trace(X'X) / head_dim.
        centred: whether the mean key is subtracted first.

    Returns:
        one score per key, float64; 0 for keys that are not live or not finite.
    """
    rows = key_rows(k, total)
    rows = rows.centred() if centred else rows
    score = squared_norms(rows, whitened(rows, ridge=ridge))
    return torch.nan_to_num(score, nan=0.0, posinf=0.0)


def sketched_leverage(
    k: Float[Tensor, "lists keys head_dim"],
    total: Int[Tensor, "lists 1"] | None = None,
    ridge: float | int = 0.0,
    *,
    width: int,
    seed: int = 0,
) -> Float[Tensor, "lists keys"]:
    """Estimate leverage scores with a Gaussian sketch of the factor: `width` products per key instead of head_dim.

    tau_j ~ ||S' F' x_j||^2,   F F' = (X'X + lambda I)^-1,   S of head_dim x width normal numbers of variance 1 / width

    Source: Drineas et al., 2012 (arXiv:1109.3843), the sketch on the right.   Differs: the Gram matrix is exact.
    Guarantee: unbiased; the standard deviation of a score is sqrt(2 / width) times the score.

    Args:
        k: keys, live keys first.
        total: number of live keys of each list; None for all.
        ridge: as for `leverage`.
        width: columns of the sketch.
        seed: seed of the sketch; all lists share one.

    Returns:
        one estimate per key, as `leverage` returns scores; a width below 1 raises ValueError.
    """
    positive("sketched_leverage", width=width)
    rows = key_rows(k, total)
    row = torch.arange(k.shape[2], dtype=torch.int64, device=k.device)[:, None]
    column = torch.arange(width, dtype=torch.int64, device=k.device)
    sketch = normal((seed, row, column, _STREAM), k.device) * width**-0.5
    score = squared_norms(rows, whitened(rows, ridge=ridge) @ sketch)
    return torch.nan_to_num(score, nan=0.0, posinf=0.0)
