"""Attention over listed keys with a softcap, which the list kernels do not support, in plain PyTorch."""

import torch
from torch import Tensor

from hyperattention.kernels.list import reference as list_torch
from hyperattention.kernels.list.operator import fields, list_attention
from hyperattention.types import Selection


def capped_list_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Compute attention of every tile of queries over the keys on its list, with capped scores.

    out_i = sum_s w_s exp(cap(scale q_i . k_s)) v_s / sum_s w_s exp(cap(scale q_i . k_s)),
    cap(x) = softcap tanh(x / softcap)

    Args:
        q: queries by tile, ``[lists, tiles, group, size, head_dim]``.
        k: keys, ``[key_rows, keys, head_dim]``.
        v: values, ``[key_rows, keys, value_dim]``.
        selection: the lists.
        scale: factor of the scores.
        softcap: bound of the scores; None for no bound, in which case `list_attention` runs.

    Returns:
        rows in the dtype of `q`, and their log-sum-exp, with the axes of `q`; a cap has no gradient.
    """
    if softcap is None:
        return list_attention(q, k, v, selection, scale)
    lists, rows = list_torch.Lists(*fields(selection)), q.flatten(2, 3)
    (num_lists, num_tiles, num_rows, head_dim), value_dim = rows.shape, v.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(num_lists * num_tiles, num_rows, value_dim)
    lse = q.new_full(out.shape[:2], -torch.inf, dtype=dtype)
    if k.shape[1] and q.numel() and lists.num_slots:
        step = list_torch.tiles_at_once(lists.num_slots, num_rows, head_dim + value_dim, len(out))
        keys, values, queries = k.flatten(0, 1), v.flatten(0, 1), rows.flatten(0, 1)
        for chunk in list_torch.chunks(lists, k.shape[1], step, dtype):
            listed = keys[chunk.key_index].to(dtype)  # [chunk, slots, head_dim]
            scores = queries[chunk.tiles].to(dtype) @ listed.transpose(1, 2) * (scale / softcap)
            scores = scores.tanh_().mul_(softcap).add_(chunk.bias)
            for slots, pairs in chunk.banned:
                scores[:, :, slots].masked_fill_(pairs, -torch.inf)
            lse[chunk.tiles] = torch.logsumexp(scores, -1)
            # softmax over no key is NaN
            weights = torch.softmax(scores, -1).masked_fill_((lse[chunk.tiles] == -torch.inf)[..., None], 0.0)
            out[chunk.tiles] = (weights @ values[chunk.key_index].to(dtype)).to(out.dtype)
    shape = (*q.shape[:4], value_dim)
    return out.view(shape), lse.view(shape[:4])
