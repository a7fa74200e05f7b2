"""Attention with weights |q . k|^p over given keys: rows normalised to sum 1, without exponentials."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hyperattention.inputs import autocast_device


def power_rows(
    q: Float[Tensor, "batch kv_heads group queries head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    hidden: Bool[Tensor, "batch #kv_heads 1 queries keys"],
    scale: float,
    power: float | int,
) -> tuple[Float[Tensor, "batch kv_heads group queries value_dim"], Float[Tensor, "batch kv_heads group queries"]]:
    """Average values with weights |scale q_i . k_j|^p, and return the log of the sum of weights.

    out_i = sum_j w_ij v_j / sum_j w_ij,   lse_i = log sum_j w_ij,   w_ij = |scale q_i . k_j|^p, 0 where hidden
    Each row is divided by its largest |score| before the power is taken, so that no power overflows.

    Args:
        q: queries, the heads of a group side by side; float32 or float64, as all tensors.
        k: keys.
        v: values.
        hidden: pairs that do not count.
        scale: factor of the scores: it cancels in the output, and shifts the lse.
        power: p.

    Returns:
        output and lse; 0 and -inf for a row whose weights are all 0, with zero gradient.
    """
    with torch.autocast(autocast_device(q), enabled=False):
        score = ((q * scale).flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])
        size = score.abs().masked_fill(hidden, 0.0)
        top = size.detach().amax(-1, keepdim=True) if k.shape[2] else size.new_zeros((*size.shape[:-1], 1))
        top = torch.where(top > 0, top, 1.0)
        weight = (size / top) ** power
        total = weight.sum(-1, keepdim=True)
        empty = total == 0
        # 1 in empty rows, because the gradient of a branch not taken must be finite as well
        total = total.masked_fill(empty, 1.0)
        out = (weight.flatten(2, 3) @ v).unflatten(2, q.shape[2:4]) / total
        lse = (power * top.log() + total.log()).masked_fill(empty, -torch.inf)
    return out, lse[..., 0]
