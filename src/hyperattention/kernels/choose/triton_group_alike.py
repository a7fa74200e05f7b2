"""Group and average the queries of a list of alike ones in Triton: no query is written to memory.

It is done as `select.score.groups` and `select.score.alike_scan.AlikeScan.of` do in PyTorch: groups
around the rows that are farthest from one another, then around their means; averages, and what they leave out.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl

from hyperattention.kernels.choose.triton_sort_alike import _finite


@triton.jit
def far_apart(few, live, groups, ROWS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr):
    """Choose the row farthest from the mean, and one after the other the row farthest from those chosen."""
    row, group = tl.arange(0, ROWS), tl.arange(0, PADDED)
    distance, least = tl.sum(few * few, 1), tl.full([ROWS], float("inf"), tl.float32)
    centre = tl.zeros([PADDED, COLUMNS], tl.float32)
    for at in tl.range(0, groups):
        far = tl.argmax(tl.where(live, distance, -1.0), 0)
        one = tl.sum(tl.where((row == far)[:, None], few, 0.0), 0)
        centre = tl.where((group == at)[:, None], one[None, :], centre)
        off = few - one[None, :]
        least = tl.minimum(least, tl.sum(off * off, 1))
        distance = least
    return centre


@triton.jit
def nearest(few, centre, live, groups, PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """Return 1 where a group's centre is the nearest to a row."""
    group = tl.arange(0, PADDED)[None, :]
    cross = tl.dot(few, tl.trans(centre), input_precision=PRECISION)
    distance = tl.where(group < groups, tl.sum(centre * centre, 1)[None, :] - 2.0 * cross, float("inf"))
    return ((tl.argmin(distance, 1)[:, None] == group) & live[:, None]).to(tl.float32)


@triton.jit
def _slice_of(q_at, live, first, DIM: tl.constexpr, SLICE: tl.constexpr):
    """Read some numbers of each query, and tell which."""
    column = first + tl.arange(0, SLICE)
    inside = live[:, None] & (column < DIM)[None, :]
    return _finite(tl.load(q_at[:, None] + column[None, :], mask=inside, other=0.0)), column


@triton.jit
def group_list(
    q_ptr, source_ptr, directions_ptr, query_ptr, spread_ptr, log_rows_ptr, scale, queries, s_head, s_query,
    EACH: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, SLICE: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Group the queries of a list, and average those of every group: see `AlikeScan.of`.

    Args:
        q_ptr: queries of the heads of a group, ``[heads, queries, DIM]``.
        source_ptr: the query in each row, counted over the heads, ``[EACH]``.
        directions_ptr: directions in which queries are compared, ``[COLUMNS, DIM]``.
        query_ptr: for the averages, ``[GROUPS, DIM]``.
        spread_ptr: for what they leave out beside half of their squares, ``[2 * DIM]``.
        log_rows_ptr: for half the logarithm of the rows of each relative to their mean number, float32.
        scale: factor of the queries.
        queries: queries of a head.
        s_head: stride of the heads of `q_ptr`.
        s_query: stride of its queries.
        EACH: rows of the list.
        ROWS: `EACH`, padded to a power of two.
        GROUPS: groups of the list.
        PADDED: `GROUPS`, padded: at least what a product has.
        DIM: numbers of a query.
        WIDTH: `DIM`, padded.
        SLICE: numbers of a query that are held at once.
        COLUMNS: number of directions.
        STEPS: times that groups are formed anew around their means.
        PRECISION: of products.
    """
    row, to, group = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    live = row < EACH
    source = tl.load(source_ptr + row, mask=live, other=0)
    q_at = q_ptr + source // queries * s_head + source % queries * s_query
    few = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, WIDTH, SLICE):
        x, column = _slice_of(q_at, live, first, DIM, SLICE)
        way_at = directions_ptr + to[None, :] * DIM + column[:, None]
        way = tl.load(way_at, mask=(column < DIM)[:, None], other=0.0).to(x.dtype)
        few = tl.dot(x, way, few, input_precision=PRECISION)
    few = _finite(few * scale)
    few = tl.where(live[:, None], few - (tl.sum(few, 0) / EACH)[None, :], 0.0)
    centre = far_apart(few, live, GROUPS, ROWS, PADDED, COLUMNS)
    for _ in tl.range(0, STEPS):
        one_of = nearest(few, centre, live, GROUPS, PADDED, PRECISION)
        count = tl.sum(one_of, 0)[:, None]
        mean = tl.dot(tl.trans(one_of), few, input_precision=PRECISION) / tl.maximum(count, 1.0)
        centre = tl.where(count > 0, mean, centre)
    one_of = nearest(few, centre, live, GROUPS, PADDED, PRECISION)
    rows = tl.sum(one_of, 0)
    for first in tl.range(0, WIDTH, SLICE):
        x, column = _slice_of(q_at, live, first, DIM, SLICE)
        # what is averaged is exact, as are its factors
        average = tl.dot(tl.trans(one_of.to(x.dtype)), x, input_precision=PRECISION)
        average *= (scale / tl.maximum(rows, 1.0))[:, None]
        off = x.to(tl.float32) * scale - tl.dot(one_of, average, input_precision=PRECISION)
        there = (group < GROUPS)[:, None] & (column < DIM)[None, :]
        kept = average.to(query_ptr.dtype.element_ty)
        tl.store(query_ptr + group[:, None] * DIM + column[None, :], kept, mask=there)
        spread_at = spread_ptr + column
        apart, half = tl.sum(off * off, 0) / EACH, tl.sum(average * average, 0) * (0.5 / GROUPS)
        tl.store(spread_at, apart.to(spread_ptr.dtype.element_ty), mask=column < DIM)
        tl.store(spread_at + DIM, half.to(spread_ptr.dtype.element_ty), mask=column < DIM)
    log_rows = 0.5 * tl.log(tl.maximum(rows * GROUPS / EACH, 1.1754943508222875e-38))
    tl.store(log_rows_ptr + group, log_rows, mask=group < GROUPS)
