"""Rows between their order in a sequence and that of sorted tiles in Triton: moved, and merged, in one launch each.

A program takes some sorted rows of a list. Each query has one live row, so that what is written by it is written once.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch

# numbers of rows that a program moves at once
_NUMBERS = 4096


@triton.jit
def _addresses(source, kv_heads, queries, GROUP: tl.constexpr, s_batch, s_head, s_query):
    """Tell where the queries of this program's list lie, which are counted over the heads of a group."""
    one = tl.program_id(1).to(tl.int64)
    head = one % kv_heads * GROUP + source // queries
    return one // kv_heads * s_batch + head * s_head + source % queries * s_query


@triton.jit
def _shares(lse, sorted_lse):
    """Tell what part of a merged row comes from either side, 0 where no key was seen, and the log of its sum."""
    top = tl.maximum(lse, sorted_lse)
    # rows that saw no key take any finite number
    top = tl.where(top == -float("inf"), 0.0, top)
    share, sorted_share = tl.exp(lse - top), tl.exp(sorted_lse - top)
    total = share + sorted_share
    divisor = tl.where(total == 0.0, 1.0, total)
    return share / divisor, sorted_share / divisor, tl.where(total == 0.0, -float("inf"), top + tl.log(divisor))


@triton.jit
def _move_kernel(
    x_ptr, sorted_ptr, source_ptr, live_ptr, count, kv_heads, queries, s_batch, s_head, s_query,
    GROUP: tl.constexpr, BACK: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    at, there = tl.program_id(1).to(tl.int64) * count + row, row < count
    source = tl.load(source_ptr + at, mask=there, other=0)
    x_at = x_ptr + _addresses(source, kv_heads, queries, GROUP, s_batch, s_head, s_query)[:, None] + column
    sorted_at, inside = sorted_ptr + at[:, None] * DIM + column, there[:, None] & (column < DIM)
    if BACK:
        inside &= tl.load(live_ptr + at, mask=there, other=0).to(tl.int1)[:, None]
        tl.store(x_at, tl.load(sorted_at, mask=inside, other=0.0), mask=inside)
    else:
        tl.store(sorted_at, tl.load(x_at, mask=inside, other=0.0), mask=inside)


@triton.jit
def _merge_kernel(
    out_ptr, lse_ptr, sorted_ptr, sorted_lse_ptr, source_ptr, live_ptr, merged_ptr, merged_lse_ptr, count, kv_heads, queries,
    s_batch, s_head, s_query, s_lse_batch, s_lse_head, s_lse_query, s_kept,
    GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    at, there = tl.program_id(1).to(tl.int64) * count + row, row < count
    source = tl.load(source_ptr + at, mask=there, other=0)
    live = tl.load(live_ptr + at, mask=there, other=0).to(tl.int1)
    inside = live[:, None] & (column < DIM)
    out_at = out_ptr + _addresses(source, kv_heads, queries, GROUP, s_batch, s_head, s_query)[:, None] + column
    lse_at = lse_ptr + _addresses(source, kv_heads, queries, GROUP, s_lse_batch, s_lse_head, s_lse_query)
    ours = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    theirs = tl.load(sorted_ptr + at[:, None] * DIM + column, mask=inside, other=0.0).to(tl.float32)
    lse, sorted_lse = tl.load(lse_at, mask=live, other=0.0), tl.load(sorted_lse_ptr + at, mask=live, other=0.0)
    share, sorted_share, merged_lse = _shares(lse, sorted_lse)
    merged = share[:, None] * ours + sorted_share[:, None] * theirs
    place = _addresses(source, kv_heads, queries, GROUP, s_kept, queries, 1)
    tl.store(merged_ptr + place[:, None] * DIM + column, merged.to(merged_ptr.dtype.element_ty), mask=inside)
    tl.store(merged_lse_ptr + place, merged_lse, mask=live)


@triton.jit
def _merge_backward_kernel(
    grad_ptr, grad_lse_ptr, out_ptr, lse_ptr, sorted_ptr, sorted_lse_ptr, source_ptr, live_ptr,
    d_out_ptr, d_lse_ptr, d_sorted_ptr, d_sorted_lse_ptr, count, kv_heads, queries,
    s_batch, s_head, s_query, s_lse_batch, s_lse_head, s_lse_query, s_kept,
    GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    at, there = tl.program_id(1).to(tl.int64) * count + row, row < count
    source = tl.load(source_ptr + at, mask=there, other=0)
    live = tl.load(live_ptr + at, mask=there, other=0).to(tl.int1)
    inside = live[:, None] & (column < DIM)
    place = _addresses(source, kv_heads, queries, GROUP, s_kept, queries, 1)
    grad = tl.load(grad_ptr + place[:, None] * DIM + column, mask=inside, other=0.0).to(tl.float32)
    grad_lse = tl.load(grad_lse_ptr + place, mask=live, other=0.0)
    out_at = out_ptr + _addresses(source, kv_heads, queries, GROUP, s_batch, s_head, s_query)[:, None] + column
    lse_at = lse_ptr + _addresses(source, kv_heads, queries, GROUP, s_lse_batch, s_lse_head, s_lse_query)
    ours = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    theirs = tl.load(sorted_ptr + at[:, None] * DIM + column, mask=inside, other=0.0).to(tl.float32)
    # padding has no gradient
    lse = tl.load(lse_at, mask=live, other=-float("inf"))
    share, sorted_share, _ = _shares(lse, tl.load(sorted_lse_ptr + at, mask=live, other=-float("inf")))
    apart = share * sorted_share * tl.sum(grad * (ours - theirs), 1)
    kept = there[:, None] & (column < DIM)
    tl.store(d_out_ptr + place[:, None] * DIM + column, (share[:, None] * grad).to(d_out_ptr.dtype.element_ty), mask=inside)
    tl.store(d_lse_ptr + place, share * grad_lse + apart, mask=live)
    d_sorted = (sorted_share[:, None] * grad).to(d_sorted_ptr.dtype.element_ty)
    tl.store(d_sorted_ptr + at[:, None] * DIM + column, d_sorted, mask=kept)
    tl.store(d_sorted_lse_ptr + at, sorted_share * grad_lse - apart, mask=there)


def launch_move(x: Tensor, rows: Tensor, source: Tensor, live: Tensor, *, back: bool) -> Launch:
    """Prepare the launch that sorts the rows of `x` into `rows`, or brings live rows back: see `operator_sorted`."""
    return _launch(_move_kernel, x, source, {"x_ptr": x, "sorted_ptr": rows, "live_ptr": live, "BACK": back})


def launch_merge(
    out: Tensor, lse: Tensor, rows: tuple[Tensor, Tensor], source: Tensor, live: Tensor, results: tuple[Tensor, Tensor]
) -> Launch:
    """Prepare the launch of `operator_sorted.merge_rows`, which writes into `results`, contiguous ones."""
    given = {"out_ptr": out, "sorted_ptr": rows[0], "sorted_lse_ptr": rows[1], "live_ptr": live, **_of_lse(lse)}
    return _launch(_merge_kernel, out, source, {**given, "merged_ptr": results[0], "merged_lse_ptr": results[1]})


def launch_merge_backward(
    grads: tuple[Tensor, Tensor], out: Tensor, lse: Tensor, rows: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor], results: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Launch:  # fmt: skip
    """Prepare the launch of `merge_rows`' gradient; gradients and results are contiguous."""
    d_out, d_lse, d_sorted, d_sorted_lse = results
    return _launch(_merge_backward_kernel, out, places[0], {
        "grad_ptr": grads[0], "grad_lse_ptr": grads[1], "out_ptr": out, "sorted_ptr": rows[0], "sorted_lse_ptr": rows[1],
        "live_ptr": places[1], "d_out_ptr": d_out, "d_lse_ptr": d_lse,
        "d_sorted_ptr": d_sorted, "d_sorted_lse_ptr": d_sorted_lse, **_of_lse(lse),
    })  # fmt: skip


def _of_lse(lse: Tensor) -> dict:
    batch, head, query = lse.stride()
    kept = lse.shape[1] * lse.shape[2]
    return {"lse_ptr": lse, "s_lse_batch": batch, "s_lse_head": head, "s_lse_query": query, "s_kept": kept}


def _launch(kernel, x: Tensor, source: Tensor, arguments: dict) -> Launch:
    """Add what all of these kernels take: `x` is by head, with numbers of a row next to one another."""
    lists, count, width = len(source), source[0].numel(), triton.next_power_of_2(x.shape[3])
    rows, kv_heads = max(1, _NUMBERS // width), lists // x.shape[0]
    return Launch(
        kernel,
        (triton.cdiv(count, rows), lists),
        {
            **arguments, "source_ptr": source, "count": count, "kv_heads": kv_heads, "queries": x.shape[2],
            "s_batch": x.stride(0), "s_head": x.stride(1), "s_query": x.stride(2), "GROUP": x.shape[1] // kv_heads,
            "DIM": x.shape[3], "ROWS": rows, "WIDTH": width, "num_warps": 4,
        },
    )  # fmt: skip
