"""Attention over listed keys with weights that are products of features, in PyTorch.

    w_is = exp(b_s + log_weight_s) phi_i . psi_s,    out_i = sum_s w_is v_s / sum_s w_is,    lse_i = log of the denominator

It is the list kernel with the score log(phi_i . psi_s) + b_s: tiles are processed in chunks, and the backward pass computes
the weights again. Features must not be negative.
"""

import torch
from torch import Tensor

from hyperattention.kernels.list.reference import Chunk, Lists, Workspace, chunks, gather, tiles_at_once


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of sums and lse: float64 if any tensor is float64, otherwise float32."""
    return torch.float64 if torch.float64 in {x.dtype for x in tensors} else torch.float32


def _scores(product: Tensor, log_scale: Tensor, chunk: Chunk) -> Tensor:
    """Turn products into scores with log scales and log-weights, in new memory; -inf if a pair does not count."""
    scores = product.log().add_(log_scale[chunk.key_index][:, None]).add_(chunk.bias)
    for slots, pairs in chunk.banned:
        scores[:, :, slots].masked_fill_(pairs, -torch.inf)
    return scores


def forward(query: Tensor, key: Tensor, value: Tensor, key_log_scale: Tensor, lists: Lists) -> tuple[Tensor, Tensor]:
    """Compute attention of every tile over the keys on its list.

    Args:
        query: features of the queries by tile, ``[lists, tiles, rows, features]``, none negative.
        key: features of the keys, ``[key_rows, keys, features]``, none negative.
        value: ``[key_rows, keys, value_dim]``.
        key_log_scale: b, ``[key_rows, keys]``.
        lists: the selection.

    Returns:
        out ``[lists, tiles, rows, value_dim]`` and lse ``[lists, tiles, rows]``, float32 or float64; 0 and -inf if a row has
        no weight.
    """
    num_lists, num_tiles, rows, width = query.shape
    dtype, slots, value_dim = accumulation_dtype(query, key, value), lists.num_slots, value.shape[-1]
    lse = query.new_full((num_lists * num_tiles, rows), -torch.inf, dtype=dtype)
    out = query.new_zeros((num_lists * num_tiles, rows, value_dim), dtype=dtype)
    if key.shape[1] and query.numel() and slots:
        flat, keys, values, scale = (
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            key_log_scale.flatten().to(dtype),
        )
        step = tiles_at_once(slots, rows, width + value_dim, len(out))
        work = Workspace.make(step, rows, slots, (width, value_dim), lse)
        for chunk in chunks(lists, key.shape[1], step, dtype):
            listed = gather(keys, chunk.key_index, work.keys)
            row = flat[chunk.tiles].to(dtype)
            scores = _scores(torch.bmm(row, listed.transpose(1, 2), out=work.scores[: len(row)]), scale, chunk)
            lse[chunk.tiles] = scores.logsumexp(-1)
            empty = lse[chunk.tiles] == -torch.inf
            weights = torch.softmax(scores, -1).masked_fill_(empty[..., None], 0.0)
            out[chunk.tiles] = torch.bmm(weights, gather(values, chunk.key_index, work.values))
            out[chunk.tiles].masked_fill_(empty[..., None], 0.0)
    return out.view(num_lists, num_tiles, rows, value_dim), lse.view(num_lists, num_tiles, rows)


def backward(
    grads: tuple[Tensor, Tensor], saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], lists: Lists
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradient of `forward`, with fixed lists.

    With p the normalised weights and c_is = p_is (g_i . (v_s - out_i) + h_i), g and h the gradients of out and lse:

        dphi_i = sum_s c_is / (phi_i . psi_s) psi_s,   dpsi_s = sum_i c_is / (phi_i . psi_s) phi_i,   db_s = sum_i c_is

    Args:
        grads: gradients of out and of lse.
        saved: query, key, value and key log scales, then out and lse of the forward pass.
        lists: the selection.

    Returns:
        gradients of query, key, value and key log scales, in their dtypes; 0 from rows without weight.
    """
    (grad_out, grad_lse), (query, key, value, key_log_scale, out, lse) = grads, saved
    rows, dtype, slots, num_keys = query.shape[2], lse.dtype, lists.num_slots, key.shape[1]
    dquery = query.new_zeros(query.shape).flatten(0, 1)
    flat_key, flat_value, scale = key.flatten(0, 1), value.flatten(0, 1), key_log_scale.flatten().to(dtype)
    dkey, dvalue, dscale = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (flat_key, flat_value, scale))
    if num_keys and query.numel() and slots:
        widths = (key.shape[2], value.shape[2])
        step = tiles_at_once(slots, rows, 2 * sum(widths), len(dquery))
        work = Workspace.make(step, rows, slots, widths, lse)
        for chunk in chunks(lists, num_keys, step, dtype):
            index, row = chunk.key_index.flatten(), query.flatten(0, 1)[chunk.tiles].to(dtype)
            keys, values = gather(flat_key, chunk.key_index, work.keys), gather(flat_value, chunk.key_index, work.values)
            product = torch.bmm(row, keys.transpose(1, 2), out=work.scores[: len(row)])
            empty = lse.flatten(0, 1)[chunk.tiles, :, None] == -torch.inf
            prob = torch.softmax(_scores(product, scale, chunk), -1).masked_fill_(empty, 0.0)
            grad = grad_out.flatten(0, 1)[chunk.tiles].to(dtype)
            dvalue.index_add_(0, index, torch.bmm(prob.transpose(1, 2), grad).flatten(0, 1))
            centre = (grad * out.flatten(0, 1)[chunk.tiles]).sum(-1, keepdim=True)
            centre = centre - grad_lse.flatten(0, 1)[chunk.tiles, :, None].masked_fill(empty, 0.0)
            slope = torch.bmm(grad, values.transpose(1, 2)).sub_(centre).mul_(prob)
            dscale.index_add_(0, index, slope.sum(1).flatten())
            # a product that underflowed has no weight, and no gradient
            ratio = (slope / product).masked_fill_(product == 0, 0.0)
            dquery[chunk.tiles] = torch.bmm(ratio, keys).to(dquery.dtype)
            dkey.index_add_(0, index, torch.bmm(ratio.transpose(1, 2), row).flatten(0, 1))
    return (
        dquery.view(query.shape),
        dkey.view(key.shape).to(key.dtype),
        dvalue.view(value.shape).to(value.dtype),
        dscale.view(key_log_scale.shape).to(key_log_scale.dtype),
    )
