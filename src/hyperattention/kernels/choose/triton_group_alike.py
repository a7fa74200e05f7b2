"""Group and average the queries of each list of alike ones in Triton: one launch, and no query is written to memory.

A program takes a list. It does what `select.score.groups` and `select.score.alike_scan.AlikeScan.of` do in PyTorch: groups
around the rows that are farthest from one another, then around their means; averages, and what they leave out.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.choose.triton_sort_alike import DIRECTIONS, _finite
from hyperattention.kernels.launch import Launch

# a program's averages, at least as many as a product has
_LEAST = 16
# bytes of a list's rows that four warps hold
_BYTES = 16_384


@triton.jit
def _far_apart(few, live, GROUPS: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr):
    """Choose the row farthest from the mean, and one after the other the row farthest from those chosen."""
    row, group = tl.arange(0, ROWS), tl.arange(0, PADDED)
    distance, nearest = tl.sum(few * few, 1), tl.full([ROWS], float("inf"), tl.float32)
    centre = tl.zeros([PADDED, COLUMNS], tl.float32)
    for at in tl.range(0, GROUPS):
        far = tl.argmax(tl.where(live, distance, -1.0), 0)
        one = tl.sum(tl.where((row == far)[:, None], few, 0.0), 0)
        centre = tl.where((group == at)[:, None], one[None, :], centre)
        off = few - one[None, :]
        nearest = tl.minimum(nearest, tl.sum(off * off, 1))
        distance = nearest
    return centre


@triton.jit
def _nearest(few, centre, live, GROUPS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """Return 1 where a group's centre is the nearest to a row."""
    group = tl.arange(0, PADDED)[None, :]
    cross = tl.dot(few, tl.trans(centre), input_precision=PRECISION)
    distance = tl.where(group < GROUPS, tl.sum(centre * centre, 1)[None, :] - 2.0 * cross, float("inf"))
    return ((tl.argmin(distance, 1)[:, None] == group) & live[:, None]).to(tl.float32)


@triton.jit
def _kernel(
    q_ptr, source_ptr, directions_ptr, query_ptr, spread_ptr, log_rows_ptr,
    scale, queries, kv_heads, chunk, s_batch, s_head, s_query, s_list,
    GROUP: tl.constexpr, MANY: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    at, one = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, column, to, group = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    live = row < EACH
    source = tl.load(source_ptr + one * s_list + at * EACH + row, mask=live, other=0)
    q_at = (one // kv_heads) * s_batch + ((one % kv_heads) * GROUP + source // queries) * s_head + source % queries * s_query
    inside = live[:, None] & (column < DIM)[None, :]
    x = _finite(tl.load(q_ptr + q_at[:, None] + column[None, :], mask=inside, other=0.0))
    way_at = directions_ptr + (one * (chunk // MANY) + at // MANY) * COLUMNS * DIM + to[None, :] * DIM + column[:, None]
    way = tl.load(way_at, mask=(column < DIM)[:, None], other=0.0).to(x.dtype)
    few = _finite(tl.dot(x, way, input_precision=PRECISION) * scale)
    few = tl.where(live[:, None], few - (tl.sum(few, 0) / EACH)[None, :], 0.0)
    centre = _far_apart(few, live, GROUPS, ROWS, PADDED, COLUMNS)
    for _ in tl.range(0, STEPS):
        one_of = _nearest(few, centre, live, GROUPS, PADDED, PRECISION)
        count = tl.sum(one_of, 0)[:, None]
        mean = tl.dot(tl.trans(one_of), few, input_precision=PRECISION) / tl.maximum(count, 1.0)
        centre = tl.where(count > 0, mean, centre)
    one_of = _nearest(few, centre, live, GROUPS, PADDED, PRECISION)
    rows = tl.sum(one_of, 0)
    # what is averaged is exact, as are its factors
    average = tl.dot(tl.trans(one_of.to(x.dtype)), x, input_precision=PRECISION)
    average *= (scale / tl.maximum(rows, 1.0))[:, None]
    off = x.to(tl.float32) * scale - tl.dot(one_of, average, input_precision=PRECISION)
    list_at = one * chunk + at
    there = (group < GROUPS)[:, None] & (column < DIM)[None, :]
    kept = average.to(query_ptr.dtype.element_ty)
    tl.store(query_ptr + (list_at * GROUPS + group)[:, None] * DIM + column[None, :], kept, mask=there)
    spread_at = spread_ptr + list_at * 2 * DIM + column
    apart, half = tl.sum(off * off, 0) / EACH, tl.sum(average * average, 0) * (0.5 / GROUPS)
    tl.store(spread_at, apart.to(spread_ptr.dtype.element_ty), mask=column < DIM)
    tl.store(spread_at + DIM, half.to(spread_ptr.dtype.element_ty), mask=column < DIM)
    log_rows = 0.5 * tl.log(tl.maximum(rows * GROUPS / EACH, 1.1754943508222875e-38))
    tl.store(log_rows_ptr + list_at * GROUPS + group, log_rows, mask=group < GROUPS)


def group_alike(
    q: Tensor, source: Tensor, directions: Tensor, groups: int, scale: float, steps: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Group the queries of each list, and average those of every group: see `AlikeScan.of`.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``.
        source: the query in each row, counted over the heads of a group, ``[lists, chunk * many, rows]``.
        directions: from `triton_sort_alike.sort_alike`.
        groups: groups of each list.
        scale: factor of the queries.
        steps: times that groups are formed anew around their means.
        dtype: dtype of averages.

    Returns:
        averages, ``[lists, chunk, many, groups, head_dim]``; what they leave out beside half of their squares,
        ``[lists, chunk, many, 2 * head_dim]``; and half the logarithm of the rows of each
        relative to their mean number, float32.
    """
    shape = (*directions.shape[:2], source.shape[1] // max(1, directions.shape[1]))
    query, spread = (q.new_empty((*shape, *last), dtype=dtype) for last in ((groups, q.shape[3]), (2 * q.shape[3],)))
    log_rows = directions.new_empty(*shape, groups)
    if query.numel():
        launch_group(q, source, directions, (query, spread, log_rows), scale, steps).run()
    return query, spread, log_rows


def launch_group(
    q: Tensor, source: Tensor, directions: Tensor, results: tuple[Tensor, Tensor, Tensor], scale: float, steps: int
) -> Launch:
    """Prepare the launch of `group_alike`, which writes into `results`."""
    q, each = q if q.stride(3) == 1 else q.contiguous(), source.shape[2]
    query, spread, log_rows = results
    many, groups = query.shape[2:4]
    rows, width = (max(16, triton.next_power_of_2(x)) for x in (each, q.shape[3]))
    kv_heads = source.shape[0] // q.shape[0]
    return Launch(
        _kernel,
        (source.shape[1], source.shape[0]),
        {
            "q_ptr": q, "source_ptr": source, "directions_ptr": directions, "query_ptr": query, "spread_ptr": spread,
            "log_rows_ptr": log_rows, "scale": scale, "queries": q.shape[2], "kv_heads": kv_heads, "chunk": source.shape[1],
            "s_batch": q.stride(0), "s_head": q.stride(1), "s_query": q.stride(2), "s_list": source.stride(0),
            "GROUP": q.shape[1] // kv_heads, "MANY": many, "EACH": each, "ROWS": rows, "GROUPS": groups,
            "PADDED": max(_LEAST, triton.next_power_of_2(groups)), "DIM": q.shape[3], "WIDTH": width,
            # estimates, of which averages are rounded further
            "COLUMNS": DIRECTIONS, "STEPS": steps, "PRECISION": "ieee" if torch.version.hip else "tf32",
            "num_warps": 4 if rows * width * q.element_size() <= _BYTES else 8, "num_stages": 1,
        },
    )  # fmt: skip
