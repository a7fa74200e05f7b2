"""Exact attention for a few rows over all keys: the reference for measured errors."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.exact import exact_attention
from hyperattention.kernels.backend import triton_reads
from hyperattention.kernels.list.reference import Lists


def exact_rows(
    rows: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    visible: Int[Tensor, " rows"],
    scale: float,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
) -> Float[Tensor, "batch heads rows value_dim"]:
    """Compute exact attention for some queries, in float32 at least.

    On a GPU, without a mask, one launch of the list kernel reads every key once: a single run of keys, split over many
    programs. Products of half-precision inputs are exact, and weights are kept to twice their precision.

    Args:
        rows: the queries.
        key: keys.
        value: values.
        visible: number of leading keys that each query may see.
        scale: factor of the scores.
        key_mask: True = attend.

    Returns:
        the rows; 0 for a row that sees no key.
    """
    if key_mask is not None or not key.shape[2] or not triton_reads(rows, key, value):
        return exact_attention(rows, key, value, scale=scale, visible=visible[None], key_mask=key_mask).out
    from hyperattention.kernels.list import triton_forward as list_triton

    (batch, heads, count, _), (kv_heads, keys) = rows.shape, key.shape[1:3]
    lists, group = batch * kv_heads, heads // kv_heads
    zero = torch.zeros(lists, 1, dtype=torch.int64, device=rows.device)
    one_run = Lists(
        key_row=torch.arange(lists, dtype=torch.int64, device=rows.device),
        row_limit=visible.repeat(group).expand(lists, 1, -1),
        first=[zero[..., None]],
        size=[keys],
        log_weight=[torch.zeros(lists, 1, 1, dtype=torch.float32, device=rows.device)],
        low=[zero],
        high=[visible.amax().expand(lists, 1)],
        hole=[zero[:0, 0]],
        causal=[True],
        labelled=[False],
        row_label=None,
        key_label=None,
        gap_low=None,
        gap_high=None,
    )
    q = rows.reshape(lists, 1, group, count, -1)
    out, _ = list_triton.forward(q, key.flatten(0, 1), value.flatten(0, 1), one_run, scale, precise=True)
    return out.reshape(batch, heads, count, -1)
