"""The feature-map kernel in PyTorch: the reference for every other feature kernel.

The weight of a pair is a product of features of the query and features of the key. So a row needs no pairs, only a *state*:
the sum over its visible keys of features times values, ``[features, value_dim + 1]``, the last column for the denominator.

    w_ij = exp(a_i + b_j) phi_i . psi_j,    out_i = sum_{j < limit_i} w_ij v_j / sum_{j < limit_i} w_ij,
    lse_i = log of the denominator

Rows are processed in the order of their limits, one block at a time: keys below the smallest limit of a block are in the
state, and the few keys between its limits are weighted pair by pair. Forward and backward use the same sum, `weighted_sums`.
No tensor of queries x keys, or of keys x features x value_dim, is ever allocated.

Source: Katharopoulos et al., 2020 (arXiv:2006.16236), states as running sums; Kacham et al., 2024 (arXiv:2310.01655),
PolySketchFormer, its causal product block by block.   Differs: any limits, not only causal ones; log scales in addition to
the features, handled as softmax handles scores; no constant is added to the denominator.
Cost: O((queries + keys) * features * value_dim) and a block of pairs per row.   Guarantee: exact for the weights above.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# keys between the state and a row's limit, weighted pair by pair: about as many products as reading a state needs
BLOCK_KEYS = 128
# rows read, or keys added, at once: bounds the copies in the accumulation dtype
CHUNK_ROWS = 512


@dataclass(frozen=True)
class _State:
    """The state of the keys before `end`, which rows read.

    Args:
        total: sum of exp(log_scale - top) key value^T, ``[lists, features, width]``.
        top: the largest log scale so far, ``[lists, 1, 1]``; -inf before the first key.
        end: number of leading keys added.
    """

    total: Tensor
    top: Tensor
    end: int

    def add(self, key: Tensor, value: Tensor, log_scale: Tensor) -> "_State":
        """Add the next keys, ``[lists, keys, ...]``."""
        top = torch.maximum(self.top, log_scale.amax(1)[:, None, None])
        base = _finite(top)
        scaled = value.to(top.dtype) * (log_scale[..., None] - base).exp()
        total = torch.baddbmm(self.total * (self.top - base).exp(), key.to(top.dtype).transpose(1, 2), scaled)
        return _State(total, top, self.end + key.shape[1])


def _finite(top: Tensor) -> Tensor:
    # rows that saw no key take any finite number here: -inf minus -inf would be NaN
    return top.masked_fill(top == -torch.inf, 0.0)


def _blocks(limit: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Cut rows, ordered by limit, into blocks of similar limits: the rows, their smallest limit, their largest limit."""
    place, number = limit // BLOCK_KEYS, torch.arange(len(limit), dtype=torch.int64, device=limit.device)
    cut = number % CHUNK_ROWS == 0
    cut[1:] |= place[1:] != place[:-1]
    edges = torch.cat([number[cut], number.new_tensor([len(limit)])])
    starts, ends = edges[:-1], edges[1:]
    for start, end, low, high in torch.stack([starts, ends, limit[starts], limit[ends - 1]], 1).tolist():
        yield slice(start, end), low, high


def weighted_sums(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Sum weighted values over the keys that each row sees.

    total_i = sum_{j < limit_i} exp(log_scale_j - top_i) (query_i . key_j) value_j,    top_i = max_{j < limit_i} log_scale_j

    Args:
        query: ``[lists, rows, features]``.
        key: ``[lists, keys, features]``.
        value: ``[lists, keys, width]``.
        log_scale: ``[lists, keys]``, in the accumulation dtype; -inf for a key that does not count.
        limit: number of leading keys each row sees, 0 to keys, in any order: ``[rows]``, shared by the lists.

    Returns:
        total ``[lists, rows, width]`` and top ``[lists, rows]``, 0 and -inf if a row sees no key.
    """
    dtype, lists, width = log_scale.dtype, len(query), value.shape[-1]
    total = log_scale.new_empty(lists, query.shape[1], width)
    top = log_scale.new_empty(lists, query.shape[1])
    limit, order = limit.sort(stable=True)
    state = _State(log_scale.new_zeros(lists, query.shape[2], width), log_scale.new_full((lists, 1, 1), -torch.inf), end=0)
    # sums rounded to bfloat16 would be useless after some thousand keys
    with torch.autocast(query.device.type, enabled=False):
        for rows, low, high in _blocks(limit):
            while state.end < low:
                part = slice(state.end, min(state.end + CHUNK_ROWS, low))
                state = state.add(key[:, part], value[:, part], log_scale[:, part])
            index, near = order[rows], slice(low, high)
            block = query[:, index].to(dtype)
            if low == high:
                block_total, block_top = block @ state.total, state.top.expand(-1, len(index), -1)
            else:
                hidden = torch.arange(low, high, dtype=torch.int64, device=limit.device) >= limit[rows, None]
                logs = log_scale[:, None, near].masked_fill(hidden, -torch.inf)  # [lists, rows, near]
                # the largest log scale of the row's own keys: that of a later key in the block could make the row's weights
                # 0
                block_top = torch.maximum(state.top, logs.amax(-1, keepdim=True))
                base = _finite(block_top)
                weight = block @ key[:, near].to(dtype).transpose(1, 2) * (logs - base).exp()
                block_total = (block @ state.total) * (state.top - base).exp() + weight @ value[:, near].to(dtype)
            total[:, index], top[:, index] = block_total, block_top[..., 0]
    return total, top


def _by_list(x: Tensor, kv_heads: int) -> Tensor:
    """Pack the heads of a group: ``[batch, heads, tokens, ...]`` to ``[lists, rows, ...]``."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).transpose(2, 3).flatten(2, 3).flatten(0, 1)


def _by_head(x: Tensor, kv_heads: int, like: Tensor) -> Tensor:
    """Undo `_by_list`, into new memory, for a tensor with the batch entries, heads and tokens of `like`."""
    batch, heads, tokens = like.shape[:3]
    x = x.unflatten(0, (batch, kv_heads)).unflatten(2, (tokens, heads // kv_heads))
    return x.transpose(2, 3).flatten(1, 2).contiguous()


def _limits(row_limit: Tensor, lists: int, group: int, keys: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the lists that share their limits, and the limit of each of their rows."""
    each = lists // max(1, len(row_limit))
    for i, limit in enumerate(row_limit.clamp(0, keys).repeat_interleave(group, 1)):
        yield slice(i * each, (i + 1) * each), limit


def _with_one(value: Tensor) -> Tensor:
    # a value of one, whose weighted sum is the denominator
    return torch.cat([value, value.new_ones((*value.shape[:-1], 1))], -1)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of sums and lse: float64 if any tensor is float64, otherwise float32."""
    return torch.float64 if torch.float64 in {x.dtype for x in tensors} else torch.float32


def forward(
    query: Tensor, key: Tensor, value: Tensor, query_log_scale: Tensor, key_log_scale: Tensor, row_limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute attention with weights that are products of features.

    Args:
        query: features of the queries, ``[batch, heads, queries, features]``.
        key: features of the keys, ``[batch, kv_heads, keys, features]``.
        value: ``[batch, kv_heads, keys, value_dim]``.
        query_log_scale: a, ``[batch, heads, queries]``.
        key_log_scale: b, ``[batch, kv_heads, keys]``.
        row_limit: number of leading keys each query sees, ``[1 or batch, queries]``; limited to 0 and the number of keys.

    Returns:
        out ``[batch, heads, queries, value_dim]`` in the dtype of `value`, and lse ``[batch, heads, queries]``, float32 or
        float64; 0 and -inf if a row's denominator is not positive.
    """
    kv_heads, keys, dtype = *key.shape[1:3], accumulation_dtype(query, key, value)
    rows, row_scale = _by_list(query, kv_heads), _by_list(query_log_scale, kv_heads).to(dtype)
    key, values, key_scale = key.flatten(0, 1), _with_one(value.flatten(0, 1)), key_log_scale.flatten(0, 1).to(dtype)
    lse, out = torch.empty_like(row_scale), values.new_empty((*rows.shape[:2], value.shape[-1]))
    for part, limit in _limits(row_limit, len(rows), query.shape[1] // kv_heads, keys):
        total, top = weighted_sums(rows[part], key[part], values[part], key_scale[part], limit)
        # features of either sign can cancel; a sum below the smallest normal number counts as 0. NaN stays NaN
        empty = total[..., -1] < torch.finfo(dtype).tiny
        denominator = total[..., -1].masked_fill(empty, 1.0)
        lse[part] = (row_scale[part] + top + denominator.log()).masked_fill(empty, -torch.inf)
        nothing = (lse[part] == -torch.inf)[..., None]
        out[part] = (total[..., :-1] / denominator[..., None]).masked_fill(nothing, 0.0).to(out.dtype)
    return _by_head(out, kv_heads, query), _by_head(lse, kv_heads, query)


def backward(
    grads: tuple[Tensor, Tensor], saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], row_limit: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the exact gradient of `forward`, by the same sums with exchanged parts.

    With g_i and h_i the gradients of out_i and lse_i, r_i = exp(a_i - lse_i), and u_i = (g_i, h_i - g_i . out_i), the slope
    of a row in (v_j, 1):

        dphi_i = r_i sum_{j < limit_i} exp(b_j) (u_i . (v_j, 1)) psi_j,    da_i = h_i
        dpsi_j = exp(b_j) sum_{i: j < limit_i} r_i ((v_j, 1) . u_i) phi_i,    db_j = psi_j . dpsi_j
        dv_j = exp(b_j) sum_{i: j < limit_i} r_i (psi_j . phi_i) g_i

    In the order of decreasing limits the rows that see a key come first, so that the sums for keys are `weighted_sums` as
    well.

    Args:
        grads: gradients of out and of lse.
        saved: query, key, value and the log scales of queries and keys, then out and lse of the forward pass.
        row_limit: as in `forward`.

    Returns:
        gradients of query, key, value and the two log scales, in their dtypes; 0 from rows without a denominator.
    """
    query, key, value, query_log_scale, key_log_scale, out, lse = saved
    kv_heads, dtype = key.shape[1], lse.dtype
    rows, row_scale, out, lse = (_by_list(x, kv_heads) for x in (query, query_log_scale, out, lse))
    grad_out, grad_lse = (_by_list(x, kv_heads).to(dtype) for x in grads)
    keys, values, key_scale = key.flatten(0, 1), _with_one(value.flatten(0, 1)), key_log_scale.flatten(0, 1).to(dtype)
    empty = lse == -torch.inf
    grad_out, grad_lse = grad_out.masked_fill(empty[..., None], 0.0), grad_lse.masked_fill(empty, 0.0)
    slope = torch.cat([grad_out, (grad_lse - (grad_out * out).sum(-1))[..., None]], -1)
    share = (row_scale.to(dtype) - lse).masked_fill(empty, -torch.inf)  # log r
    grad_rows, grad_keys, grad_values = (share.new_empty(x.shape) for x in (rows, keys, values[..., :-1]))
    for part, limit in _limits(row_limit, len(rows), query.shape[1] // kv_heads, keys.shape[1]):
        total, top = weighted_sums(slope[part], values[part], keys[part], key_scale[part], limit)
        grad_rows[part] = total * (share[part] + top).exp()[..., None]
        falling, order = limit.sort(descending=True)
        # number of rows with a limit above each key
        seen_by = torch.searchsorted(-falling, -torch.arange(keys.shape[1], dtype=torch.int64, device=limit.device))
        ordered, slopes, shares = (x[part][:, order] for x in (rows, slope, share))
        total, top = weighted_sums(values[part], slopes, ordered, shares, seen_by)
        grad_keys[part] = total * (key_scale[part] + top).exp()[..., None]
        total, top = weighted_sums(keys[part], ordered, slopes[..., :-1], shares, seen_by)
        grad_values[part] = total * (key_scale[part] + top).exp()[..., None]
    return (
        _by_head(grad_rows, kv_heads, query).to(query.dtype),
        grad_keys.view(key.shape).to(key.dtype),
        grad_values.view(value.shape).to(value.dtype),
        _by_head(grad_lse, kv_heads, query).to(query_log_scale.dtype),
        (keys * grad_keys).sum(-1).view(key_log_scale.shape).to(key_log_scale.dtype),
    )
