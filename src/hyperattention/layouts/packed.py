"""Packed sequences: attention within each, without a dense mask."""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.attention import attention
from hyperattention.inputs import autocast_device, check_inputs, check_masks, check_tensors, narrowed
from hyperattention.kernels.backend import triton_reads
from hyperattention.layouts.ragged import Packed, ragged_attention
from hyperattention.methods.base import Approach
from hyperattention.methods.default import default_method
from hyperattention.methods.exact import Exact
from hyperattention.transforms import scale_of


def varlen_attention(
    query: Float[Tensor, "1 heads queries head_dim"],
    key: Float[Tensor, "1 kv_heads keys head_dim"],
    value: Float[Tensor, "1 kv_heads keys value_dim"],
    cu_seq_q: Int[Tensor, " sequences_plus_one"],
    cu_seq_k: Int[Tensor, " sequences_plus_one"] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    method: Approach | None = None,
    seed: int = 0,
    layer: int = 0,
    causal_align: str = "upper_left",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend within each of several sequences packed one after another, without a dense mask.

    On a GPU, without gradients, the sequences served exactly share one launch of the list kernel; each of the others has its
    own. Edges on a device make the host wait for it.

    Args:
        query: queries of all sequences, end to end.
        key: keys of all sequences.
        value: values of all sequences.
        cu_seq_q: where each sequence's queries begin, and where the last ends: 0, n_1, n_1 + n_2, ...
        cu_seq_k: the same for keys; as for queries if None.
        is_causal: whether a query sees only keys of its sequence at or before its position.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.
        enable_gqa: whether several query heads may share a kv head.
        method: what runs for each sequence; None decides by each sequence's own length.
        seed: seed of every draw.
        layer: layer of the model.
        causal_align: as for `attention`, within each sequence.
        return_lse: whether to return the log-sum-exp as well.

    Returns:
        out ``[1, heads, queries, value_dim]``, or out and lse ``[1, heads, queries]``, float32 or float64.

    Raises:
        ValueError: if the sequences do not cover the queries or the keys.
    """
    check_tensors(query=query, key=key, value=value)
    query, key, value = narrowed(query, key, value)
    check_inputs(query, key, value, enable_gqa=enable_gqa, dropout_p=0.0, seed=seed, check_finite=False)
    check_masks(query, key, None, None, is_causal=is_causal, causal_align=causal_align, audit=None)
    cu_seq_k = cu_seq_q if cu_seq_k is None else cu_seq_k
    edges_q, edges_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    for name, edges, count in (("cu_seq_q", edges_q, query.shape[2]), ("cu_seq_k", edges_k, key.shape[2])):
        if not edges or edges[0] != 0 or edges[-1] != count or edges != sorted(edges):
            raise ValueError(f"{name} is {edges}: it must rise from 0 to the number of tokens, {count}")
    if len(edges_q) != len(edges_k):
        raise ValueError(f"cu_seq_q names {len(edges_q) - 1} sequences and cu_seq_k {len(edges_k) - 1}: give one edge each")
    runs = [
        default_method(k1 - k0, num_queries=q1 - q0, device=key.device) if method is None else method
        for (q0, q1), (k0, k1) in zip(pairwise(edges_q), pairwise(edges_k), strict=True)
    ]
    scale = scale_of(scale, query.shape[-1])
    # with gradients torch's own kernel is the faster one for all but short sequences
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    share = triton_reads(query, key, value) and not learning
    together = [s for s, run in enumerate(runs) if isinstance(run, Exact)] if share else []
    parts: dict[int, tuple] = {}
    if len(together) > 1:
        parts = _exact(query, key, value, edges_q, edges_k, together, scale, is_causal, causal_align == "lower_right")
    for s, ((q0, q1), (k0, k1)) in enumerate(zip(pairwise(edges_q), pairwise(edges_k), strict=True)):
        if s not in parts:
            pieces = query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1]
            part = attention(
                *pieces, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, method=runs[s], seed=seed, layer=layer,
                causal_align=causal_align, return_lse=return_lse,
            )  # fmt: skip
            parts[s] = (part,) if isinstance(part, Tensor) else part
    if not parts:
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        return (out, query.new_empty(query.shape[:3], dtype=torch.float32)) if return_lse else out
    joined = [torch.cat(x, 2) for x in zip(*(parts[s][: 1 + return_lse] for s in range(len(runs))), strict=True)]
    return (joined[0], joined[1]) if return_lse else joined[0]


def _exact(
    query: Tensor, key: Tensor, value: Tensor, edges_q: list[int], edges_k: list[int], which: list[int],
    scale: float, causal: bool, lower_right: bool,
) -> dict[int, tuple[Tensor, ...]]:  # fmt: skip
    """Attend exactly within several sequences in one launch: out and lse of each, ``[1, heads, queries, ...]``."""
    count, keys = ([edges[s + 1] - edges[s] for s in which] for edges in (edges_q, edges_k))
    offset = [k - c if lower_right else 0 for k, c in zip(keys, count, strict=True)]
    packed = Packed([edges_q[s] for s in which], count, keys, offset, causal)
    with torch.autocast(autocast_device(query), enabled=False):
        out, lse = ragged_attention(
        query[0].transpose(0, 1), key[0], value[0], packed, scale, first_key=[edges_k[s] for s in which],
        kv_heads=key.shape[1],
    )  # fmt: skip
    each = zip(out.transpose(0, 1).split(count, 1), lse.transpose(0, 1).split(count, 1), strict=True)
    return {s: (o[None], m[None]) for s, (o, m) in zip(which, each, strict=True)}
