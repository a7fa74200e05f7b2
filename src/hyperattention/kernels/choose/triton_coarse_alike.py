"""Group the averages of some lists in Triton, and average those of every group: few averages that score all keys of a tile.

`select.score.alike_scan.AlikeScan.coarser` does the same in PyTorch.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl

from hyperattention.kernels.choose.triton_group_alike import far_apart, nearest


@triton.jit
def _averages(query_ptr, row, live, first, DIM: tl.constexpr, SLICE: tl.constexpr):
    """Read some numbers of each average, and tell which."""
    column = first + tl.arange(0, SLICE)
    inside = live[:, None] & (column < DIM)[None, :]
    return tl.load(query_ptr + row[:, None] * DIM + column[None, :], mask=inside, other=0.0).to(tl.float32), column


@triton.jit
def group_averages(
    query_ptr, spread_ptr, log_rows_ptr, directions_ptr, coarse_ptr, coarse_spread_ptr, coarse_rows_ptr,
    lists, groups, bound,
    OF_LIST: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    SLICE: tl.constexpr, COLUMNS: tl.constexpr, LISTS: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Group the averages of some lists of one tile by what queries are compared by, and average those of every group.

    Args:
        query_ptr: averages of each list, ``[lists, OF_LIST, DIM]``.
        spread_ptr: what they leave out, ``[lists, 2 * DIM]``: the first half is read.
        log_rows_ptr: half the logarithm of the queries in each relative to their mean number, float32.
        directions_ptr: directions in which queries are compared, ``[COLUMNS, DIM]``.
        coarse_ptr: for the averages of groups, ``[PADDED, DIM]``.
        coarse_spread_ptr: for what both leave out, ``[DIM]``.
        coarse_rows_ptr: for half the logarithm of the queries in each group, ``[PADDED]``, float32; -`bound` beyond the
            groups.
        lists: number of lists.
        groups: number of groups.
        bound: of logarithms.
        OF_LIST: averages of a list.
        ROWS: averages, padded to a power of two.
        PADDED: most groups, padded to a power of two: at least what a product has.
        DIM: numbers of an average.
        WIDTH: `DIM`, padded.
        SLICE: numbers of an average that are held at once.
        COLUMNS: number of directions.
        LISTS: most lists.
        STEPS: times that groups are formed anew around their means.
        PRECISION: of products.
    """
    row, to, group, one = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, PADDED), tl.arange(0, LISTS)
    count = lists * OF_LIST
    live = row < count
    few = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, WIDTH, SLICE):
        x, column = _averages(query_ptr, row, live, first, DIM, SLICE)
        way_at = directions_ptr + to[None, :] * DIM + column[:, None]
        way = tl.load(way_at, mask=(column < DIM)[:, None], other=0.0).to(tl.float32)
        few = tl.dot(x, way, few, input_precision=PRECISION)
    # queries in each, relative to their mean number
    rows = tl.exp(2.0 * tl.load(log_rows_ptr + row, mask=live, other=-float("inf")))
    in_all = tl.sum(rows, 0)
    # averages of no query stand where queries are compared from: in the middle of all, or with few numbers at 0
    if DIM > COLUMNS:
        few -= (tl.sum(few * rows[:, None], 0) / in_all)[None, :]
    few = tl.where((rows > 1e-30)[:, None], few, 0.0)
    few = tl.where(live[:, None], few - (tl.sum(few, 0) / count)[None, :], 0.0)
    centre = far_apart(few, live, groups, ROWS, PADDED, COLUMNS)
    for _ in tl.range(0, STEPS):
        one_of = nearest(few, centre, live, groups, PADDED, PRECISION)
        members = tl.sum(one_of, 0)[:, None]
        mean = tl.dot(tl.trans(one_of), few, input_precision=PRECISION) / tl.maximum(members, 1.0)
        centre = tl.where(members > 0, mean, centre)
    one_of = nearest(few, centre, live, groups, PADDED, PRECISION)
    total = tl.maximum(tl.sum(one_of * rows[:, None], 0), 1.1754943508222875e-38)
    for first in tl.range(0, WIDTH, SLICE):
        x, column = _averages(query_ptr, row, live, first, DIM, SLICE)
        average = tl.dot(tl.trans(one_of), x * rows[:, None], input_precision=PRECISION) / total[:, None]
        off = x - tl.dot(one_of, average, input_precision=PRECISION)
        there = column < DIM
        kept = average.to(coarse_ptr.dtype.element_ty)
        tl.store(coarse_ptr + group[:, None] * DIM + column[None, :], kept, mask=there[None, :])
        apart = tl.sum(off * off * rows[:, None], 0) / in_all
        # what the averages left out before
        before_at = spread_ptr + one[:, None] * (2 * DIM) + column[None, :]
        before = tl.load(before_at, mask=(one < lists)[:, None] & there[None, :], other=0.0).to(tl.float32)
        apart += tl.sum(before, 0) / lists
        tl.store(coarse_spread_ptr + column, apart.to(coarse_spread_ptr.dtype.element_ty), mask=there)
    log_rows = 0.5 * tl.log(total * groups / in_all)
    tl.store(coarse_rows_ptr + group, tl.where(group < groups, log_rows, -bound))
