"""A few queries over all slots of a coreset in Triton: one launch, and one more to merge if a list is split.

A program takes the rows of a kv head, which are all query heads of its group, so that these share the keys it fetches. It
reads its share of the slots in order; no index is read.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.decode.triton_parts import (
    LOG2_E,
    DecodeShape,
    begun,
    decode_shape_of,
    empty_results,
    finished,
    launch_merge,
    scores_of,
    splits_of,
    taken,
)
from hyperattention.kernels.launch import Launch, precision_of
from hyperattention.kernels.list.triton_forward import widest


# numbers that grow from step to step are not compiled for
@triton.jit(do_not_specialize=["slots", "splits"])
def _coreset_kernel(
    q_ptr, k_ptr, v_ptr, weight_ptr, length_ptr, sink_ptr, out_ptr, lse_ptr,
    scale, cap, slots, kv_heads, group, queries, splits,
    q_batch, q_head, q_query, k_batch, k_head, v_batch, v_head, w_batch, w_head, w_slot,
    KS: tl.constexpr, VS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, LENGTH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    list_number, split = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (list_number // kv_heads).to(tl.int64), (list_number % kv_heads).to(tl.int64)
    row, rows = tl.arange(0, ROWS), group * queries
    inside = row < rows
    query, head = row % queries, kv_head * group + row // queries
    columns, value_columns = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    q_at = q_ptr + batch * q_batch + head * q_head + query * q_query
    q = tl.load(q_at[:, None] + columns[None, :], mask=inside[:, None] & (columns[None, :] < HEAD_DIM), other=0.0)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    weight_ptr += batch * w_batch + kv_head * w_head
    many = slots
    if LENGTH:
        many = tl.minimum(slots, tl.load(length_ptr + list_number).to(tl.int32))
    share = tl.cdiv(tl.cdiv(many, BLOCK), splits) * BLOCK
    end = tl.minimum(many, (split + 1) * share)

    top, total = begun(sink_ptr, head, inside, split, SINKS, ROWS)
    mean = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for first in tl.range(split * share, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        there = slot < end
        at = slot.to(tl.int64)[:, None]
        in_key, in_value = there[:, None], there[:, None]
        if WIDTH != HEAD_DIM:
            in_key = in_key & (columns[None, :] < HEAD_DIM)
        if VALUE_WIDTH != VALUE_DIM:
            in_value = in_value & (value_columns[None, :] < VALUE_DIM)
        k = tl.load(k_ptr + at * KS + columns[None, :], mask=in_key, other=0.0)
        v = tl.load(v_ptr + at * VS + value_columns[None, :], mask=in_value, other=0.0)
        bias = tl.load(weight_ptr + slot.to(tl.int64) * w_slot, mask=there, other=-float("inf")) * LOG2_E
        score = scores_of(q, k, scale, cap, CAPPED, PRECISION) + bias[None, :]
        if CAUSAL:
            score = tl.where(slot[None, :] <= many - queries + query[:, None], score, -float("inf"))
        top, total, mean = taken(score, v, top, total, mean, PRECISION)

    mean, lse = finished(top, total, mean)
    stored = (split.to(tl.int64) * tl.num_programs(0) + list_number) * rows + row
    tl.store(lse_ptr + stored, lse, mask=inside)
    out_at = out_ptr + stored[:, None] * VALUE_DIM + value_columns[None, :]
    in_value = inside[:, None] & (value_columns[None, :] < VALUE_DIM)
    tl.store(out_at, mean.to(out_ptr.dtype.element_ty), mask=in_value)


def decode_coreset(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor,
    length: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    *,
    causal: bool,
    softcap: float | None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention of a few queries over a coreset: see `operator.decode_coreset`.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``.
        k: keys, ``[batch, kv_heads, slots, head_dim]``.
        v: values, ``[batch, kv_heads, slots, value_dim]``.
        log_weight: log-weights, ``[batch, kv_heads, slots]``.
        length: number of slots of each list that count, ``[batch, kv_heads]``; None for all.
        sinks: learned sinks, ``[heads]``; None for none.
        scale: factor of the scores.
        causal: whether the last slots are the queries' own keys.
        softcap: bound of the scores; None for none.
        splits: programs that share a list; None chooses by the size of the device.

    Returns:
        out in the dtype of `q`, and lse in float32.
    """
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
    cut = decode_shape_of(q.shape[1] // k.shape[1] * q.shape[2], widest(q, v), q.element_size())
    lists = k.shape[0] * k.shape[1]
    splits = splits_of(lists, triton.cdiv(k.shape[2], cut.block), q.device) if splits is None else splits
    results, parts = empty_results(q, v.shape[3], splits)
    if results[1].numel():
        launch_coreset((q, k, v, log_weight, length, sinks), parts, scale, cut, causal=causal, softcap=softcap).run()
        if splits > 1:
            launch_merge(parts, results).run()
    return results


def launch_coreset(
    given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    parts: tuple[Tensor, Tensor],
    scale: float,
    cut: DecodeShape,
    *,
    causal: bool,
    softcap: float | None,
) -> Launch:
    """Prepare the launch, to run it or to compile it for another machine.

    Args:
        given: q, k, v, log-weights, lengths and sinks of `decode_coreset`.
        parts: out ``[splits, batch, heads, queries, value_dim]`` and lse without its last axis, to be written.
        scale: factor of the scores.
        cut: shape of a program.
        causal: whether the last slots are the queries' own keys.
        softcap: bound of the scores; None for none.

    Returns:
        the launch.
    """
    q, k, v, weight, length, sinks = given
    (batch, heads, queries, head_dim), (kv_heads, slots), value_dim = q.shape, k.shape[1:3], v.shape[3]
    group = heads // kv_heads
    return Launch(
        _coreset_kernel,
        (batch * kv_heads, len(parts[1])),
        {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "weight_ptr": weight,
            "length_ptr": weight if length is None else length.contiguous(), "sink_ptr": weight if sinks is None else sinks,
            "out_ptr": parts[0], "lse_ptr": parts[1], "scale": scale, "cap": softcap or 1.0, "slots": slots,
            "kv_heads": kv_heads, "group": group, "queries": queries, "splits": len(parts[1]),
            **{f"q_{name}": q.stride(axis) for axis, name in enumerate(("batch", "head", "query"))},
            "k_batch": k.stride(0), "k_head": k.stride(1), "v_batch": v.stride(0), "v_head": v.stride(1),
            **{f"w_{name}": weight.stride(axis) for axis, name in enumerate(("batch", "head", "slot"))},
            "KS": k.stride(2), "VS": v.stride(2), "HEAD_DIM": head_dim, "VALUE_DIM": value_dim,
            "CAUSAL": causal and queries > 1, "CAPPED": softcap is not None, "SINKS": sinks is not None,
            "LENGTH": length is not None, "PRECISION": precision_of(q),
            "ROWS": max(16, triton.next_power_of_2(group * queries)), "BLOCK": cut.block,
            "WIDTH": max(16, triton.next_power_of_2(head_dim)), "VALUE_WIDTH": max(16, triton.next_power_of_2(value_dim)),
            "num_warps": cut.warps, "num_stages": cut.stages,
        },
    )  # fmt: skip
