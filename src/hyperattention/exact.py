"""Exact attention with its lse, a chunk of query rows at a time: the reference for every method.

No tensor of queries x keys is ever allocated, with or without gradients. Key/value heads are never repeated: the query
heads of a group are folded into the rows of one matrix product.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hyperattention.transforms import transform_of
from hyperattention.types import Partial

# up to this many rows are multiplied by spans of this many keys, as a batch: one wide product takes twice as long on a CPU
_FEW_ROWS, _SPAN = 64, 512
# 16 MB of float32 scores: about what stays in the last-level cache between the passes over it
_CHUNK_SCORES = 4 * 2**20
# below this many rows a matrix product is bound by reading the keys, so heads are split before rows are
_MIN_ROWS = 64


def visible_keys(
    num_queries: int, num_keys: int, is_causal: bool, causal_align: str, device: torch.device | str
) -> Int[Tensor, "1 queries"] | None:
    """Count the leading keys that each query may see; `exact_attention` takes causality in this form.

    upper_left: query i sees i + 1 keys; lower_right: i + 1 + num_keys - num_queries; both cut to [0, num_keys].

    Args:
        num_queries: number of queries.
        num_keys: number of keys.
        is_causal: whether later keys are hidden from queries.
        causal_align: "upper_left" or "lower_right".
        device: device of the counts.

    Returns:
        one count per query, for all batch entries, or None if every query sees every key.

    Raises:
        ValueError: if `causal_align` is neither "upper_left" nor "lower_right".
    """
    if causal_align not in ("upper_left", "lower_right"):
        raise ValueError(f"causal_align={causal_align!r}: must be 'upper_left' or 'lower_right'")
    if not is_causal:
        return None
    shift = num_keys - num_queries if causal_align == "lower_right" else 0
    return (torch.arange(num_queries, dtype=torch.int64, device=device) + (1 + shift)).clamp(0, num_keys)[None]


def visible_bounds(visible: Int[Tensor, "#batch queries"], num_keys: int) -> tuple[int, int]:
    """Return how many leading keys every row sees, and how many at least one row sees: other keys need no mask or no score.

    Args:
        visible: number of leading keys each row may see.
        num_keys: number of keys.

    Returns:
        the smallest and the largest count, within [0, num_keys]; or (0, num_keys), which is always safe, if reading the
        counts would synchronise a device, would break a graph or is impossible.
    """
    if type(visible) is not Tensor or visible.device.type != "cpu" or torch.compiler.is_compiling() or not visible.numel():
        return 0, num_keys
    low, high = visible.aminmax()
    return min(max(int(low), 0), num_keys), min(max(int(high), 0), num_keys)


def grouped_scores(
    q: Float[Tensor, "batch kv_heads group queries head_dim"], k: Float[Tensor, "batch kv_heads keys head_dim"], scale: float
) -> Float[Tensor, "batch kv_heads group queries keys"]:
    """Score a few rows against all keys, the query heads of a group in one product.

    Args:
        q: the rows, query heads grouped by their kv head.
        k: keys, of the same dtype.
        scale: factor on the scores.

    Returns:
        scale * q_i.k_j, in new memory.
    """
    rows, whole = (q * scale).flatten(2, 3), k.shape[2] // _SPAN * _SPAN
    if rows.shape[2] > _FEW_ROWS or not whole or rows.device.type != "cpu":
        return (rows @ k.transpose(-1, -2)).unflatten(2, q.shape[2:4])
    spans = rows[:, :, None] @ k[:, :, :whole].unflatten(2, (-1, _SPAN)).transpose(-1, -2)
    scores = rows.new_empty((*rows.shape[:3], k.shape[2]))
    scores[..., :whole].unflatten(3, (-1, _SPAN)).copy_(spans.transpose(2, 3))
    scores[..., whole:] = rows @ k[:, :, whole:].transpose(-1, -2)
    return scores.unflatten(2, q.shape[2:4])


def softmax_rows(
    scores: Float[Tensor, "batch kv_heads group queries keys"],
    *,
    visible: Int[Tensor, "#batch queries"] | None = None,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
) -> tuple[
    Float[Tensor, "batch kv_heads group queries keys"],
    Float[Tensor, "batch kv_heads group queries 1"],
    Float[Tensor, "batch kv_heads group queries"],
]:
    """Exponentiate rows of scores, in place.

    weights_ij = exp(score_ij - top_i),  total_i = sum_j weights_ij,  lse_i = top_i + log total_i

    Args:
        scores: the rows; their memory becomes the weights.
        visible: number of leading keys each row may see; None = all.
        key_mask: True = attend.

    Returns:
        weights (at most 1, 0 where hidden), their totals, and lse; total 0 and lse -inf if a row sees no key.
    """
    keys = scores.shape[-1]
    if visible is not None and (start := visible_bounds(visible, keys)[0]) < keys:
        # columns before `start` are seen by every row and need no mask, which saves most of this pass
        hidden = torch.arange(start, keys, dtype=torch.int64, device=scores.device) >= visible[:, None, None, :, None]
        scores[..., start:].masked_fill_(hidden, -torch.inf)
    if key_mask is not None:
        scores = scores.masked_fill_(~key_mask[:, None, None, None], -torch.inf)
    # amax over zero keys is undefined; any finite top works for a row that sees no key
    top = scores.detach().amax(-1, keepdim=True) if keys else scores.new_zeros((*scores.shape[:-1], 1))
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    # log of 1, not of 0, in empty rows: the gradient of the branch not taken would be NaN
    lse = (top + total.masked_fill(empty, 1.0).log()).masked_fill(empty, -torch.inf).squeeze(-1)
    return weights, total, lse


def exact_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    scale: float,
    visible: Int[Tensor, "#batch queries"] | None = None,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    row_index: Int[Tensor, " rows"] | None = None,
    attn_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
) -> Partial:
    """Compute softmax attention and its lse exactly, for all query rows or some, in memory linear in the keys.

    out_i = sum_j exp(scale q_i.k_j - lse_i) v_j,  lse_i = log sum_j exp(scale q_i.k_j), over the keys row i may see.
    Source: Rabe and Staats, 2021, "Self-attention does not need O(n^2) memory". Differs: only rows are cut into chunks, so
    each row's softmax is one pass.
    Cost: O(queries * keys * head_dim) time, O(chunk * keys) memory; with gradients chunks are recomputed, not stored.
    Guarantee: exact, in float32 (float64 for float64 input), under autocast too.

    Args:
        q: queries; `heads` must be a multiple of `kv_heads`.
        k: keys; query head h reads kv head h // (heads // kv_heads).
        v: values.
        scale: factor on the scores.
        visible: number of leading keys each query may see, as from `visible_keys`; None = all.
        key_mask: True = attend.
        row_index: query rows to compute, shared by all batch entries and heads; None = all, in order.
        attn_mask: as in SDPA, additive or boolean (True = attend), broadcasting to [batch, heads, queries, keys].

    Returns:
        rows in the accumulation dtype; out 0 and lse -inf, with zero gradient, if a row sees no key.

    Raises:
        ValueError: if `heads` is not a multiple of `kv_heads`, or `attn_mask` does not broadcast.
    """
    heads, kv_heads, keys = q.shape[1], k.shape[1], k.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} kv heads: must be a multiple; check the head axis of q and k")
    bias = None if attn_mask is None else _grouped_mask(attn_mask, (q.shape[0], heads, q.shape[2], keys), kv_heads)
    if row_index is not None:
        q = q.index_select(2, row_index)
        visible = None if visible is None else visible.index_select(1, row_index)
        bias = bias if bias is None or bias.shape[3] == 1 else bias.index_select(3, row_index)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.unflatten(1, (kv_heads, heads // kv_heads)), k.to(dtype), v.to(dtype)
    head_size, row_size = _chunk_sizes(q.shape, keys)
    outs, lses = [], []
    for head_slice in _slices(kv_heads, head_size):
        pieces = []
        for row_slice in _slices(q.shape[3], row_size):
            seen = None if visible is None else visible[:, row_slice]
            stop = keys if seen is None else visible_bounds(seen, keys)[1]
            arguments = (
                q[:, head_slice, :, row_slice].to(dtype),
                k[:, head_slice, :stop],
                v[:, head_slice, :stop],
                scale,
                seen,
                None if key_mask is None else key_mask[:, :stop],
                None if bias is None else _mask_block(bias, head_slice, row_slice, stop),
            )
            pieces.append(_attend_saving_memory(arguments) if row_size < q.shape[3] else _attend(*arguments))
        outs.append(torch.cat([out for out, _ in pieces], dim=3))
        lses.append(torch.cat([lse for _, lse in pieces], dim=3))
    return Partial(torch.cat(outs, dim=1).flatten(1, 2), torch.cat(lses, dim=1).flatten(1, 2))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    visible: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # a reference rounded to bfloat16 would be useless, so autocast is off here
    with torch.autocast(q.device.type if q.device.type != "meta" else "cpu", enabled=False):
        scores = grouped_scores(q, k, scale)
        if bias is not None:
            scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
        weights, total, lse = softmax_rows(scores, visible=visible, key_mask=key_mask)
        out = (weights.flatten(2, 3) @ v).unflatten(2, q.shape[2:4])
        return out / total.masked_fill(total == 0, 1.0), lse


def _attend_saving_memory(arguments: tuple) -> tuple[Tensor, Tensor]:
    # torch.func's transforms do not support the hooks that recomputation needs: they store the chunk's weights instead
    if not torch.is_grad_enabled() or transform_of(*arguments[:3]) is not None:
        return _attend(*arguments)
    # backward recomputes the chunk: storing its weights would add up to queries x keys
    return checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)


def _chunk_sizes(q_shape: torch.Size, keys: int) -> tuple[int, int]:
    batch, kv_heads, group, queries, _ = q_shape
    per_row = max(1, batch * group * keys)
    head_size = min(max(1, _CHUNK_SCORES // (per_row * min(_MIN_ROWS, max(1, queries)))), max(1, kv_heads))
    return head_size, max(1, min(_CHUNK_SCORES // (per_row * head_size), max(1, queries)))


def _slices(length: int, size: int) -> Iterator[slice]:
    # one empty slice for an empty axis, so that results keep their shapes and stay in the graph
    return (slice(start, min(start + size, length)) for start in range(0, max(length, 1), size))


def _grouped_mask(attn_mask: Tensor, shape: tuple[int, int, int, int], kv_heads: int) -> Tensor:
    mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    if mask.dim() != 4 or any(size not in (1, full) for size, full in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"attn_mask has shape {tuple(attn_mask.shape)}, which does not broadcast to {shape}: give each axis its "
            "size or 1"
        )
    return mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, -1))


def _mask_block(mask: Tensor, head_slice: slice, row_slice: slice, stop: int) -> Tensor:
    mask = mask if mask.shape[1] == 1 else mask[:, head_slice]
    mask = mask if mask.shape[3] == 1 else mask[:, :, :, row_slice]
    return mask if mask.shape[4] == 1 else mask[..., :stop]
