"""Shares of keys for lists of alike queries in Triton: scores are not written to memory.

A program scores all keys by the averages of some lists. `select.score.alike_scan` does it in chunks on a CPU: the largest
normalised score over the groups of a list, an allowance for what averages hide, and the exponential of both.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def share_keys(
    query_ptr, bar_ptr, spread_ptr, keys_ptr, variance_ptr, log_value_ptr, edges_ptr, share_ptr, numbers_ptr,
    begin, until, room, size, given,
    EDGES: tl.constexpr, MANY: tl.constexpr, OF_LIST: tl.constexpr, DIM: tl.constexpr, DEVIATIONS: tl.constexpr,
    WITHIN: tl.constexpr, LISTS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, TOGETHER: tl.constexpr, AMONG: tl.constexpr,
):  # fmt: skip
    """Estimate the largest share that a query of each of some lists gives a key of each block: see `AlikeScan.shares`.

    Args:
        query_ptr: averages of each group, ``[LISTS, OF_LIST, DIM]``.
        bar_ptr: what each average's scores are compared with, ``[LISTS, OF_LIST]``, float32.
        spread_ptr: what averages leave out, beside half of their squares, ``[LISTS, 2 * DIM]``.
        keys_ptr: means of blocks, ``[blocks, DIM]``.
        variance_ptr: variances inside blocks, of the same shape; not read without `WITHIN`.
        log_value_ptr: logarithm of how far values lie, float32.
        edges_ptr: edges of each tile, the last of which counts the keys that it may score, ``[tiles, EDGES]``.
        share_ptr: for the shares, ``[LISTS, room]``: 0 from the blocks on that a list does not know.
        numbers_ptr: numbers of the keys to score; not read without `AMONG`.
        begin: the first of these lists.
        until: the end of these lists.
        room: places of a list in `share_ptr`, a multiple of `KEYS`.
        size: keys in a block.
        given: keys to score; not used without `AMONG`, where these are all that a list knows.
        EDGES: numbers of a tile in `edges_ptr`.
        MANY: lists of a tile.
        OF_LIST: averages of a list.
        DIM: numbers of a key.
        DEVIATIONS: deviations by which a query may exceed the average of its group.
        WITHIN: whether blocks have several keys.
        LISTS: lists that share the keys that are read.
        GROUPS: `OF_LIST`, padded to a power of two.
        WIDTH: `DIM`, padded.
        KEYS: blocks read at once.
        STAGES: blocks of keys that are on their way.
        PRECISION: of products.
        TOGETHER: whether lists are parts of one, which has a single row of `spread_ptr` and of shares: its share of a key is
            the largest of theirs, may exceed 1, and is -1 for keys that it does not know or that earlier stages took.
        AMONG: whether keys are given by their numbers.

    Returns:
        the number of blocks that have shares.
    """
    column = tl.arange(0, WIDTH)[None, :]
    # averages: all lists of a group stand together, so that the largest over groups is found inside a thread
    average = tl.arange(0, LISTS * GROUPS)
    group, of = average // LISTS, average % LISTS
    there = (begin + of < until) & (group < OF_LIST)
    at = of * OF_LIST + group
    query = tl.load(query_ptr + at[:, None] * DIM + column, mask=there[:, None] & (column < DIM), other=0.0)
    # what is no average is below any score
    bar = tl.load(bar_ptr + at, mask=there, other=float("inf"))
    one = tl.arange(0, LISTS)
    known = tl.load(edges_ptr + (begin + one) // MANY * EDGES + EDGES - 1, mask=begin + one < until, other=0)
    known = known.to(tl.int32) // size
    spread_at = spread_ptr + (one * (0 if TOGETHER else 2 * DIM))[:, None] + column
    inside = (begin + one < until)[:, None] & (column < DIM)
    spread = tl.load(spread_at, mask=inside, other=0.0)
    if WITHIN:
        half = tl.load(spread_at + DIM, mask=inside, other=0.0)
    query, spread = tl.trans(query), tl.trans(spread)
    share_at = share_ptr + one[None, :] * room
    count = tl.max(known, 0)
    if AMONG:
        count = given
    if TOGETHER:
        left_begin, left_end = tl.load(edges_ptr).to(tl.int32), tl.load(edges_ptr + 3).to(tl.int32)
        hole_begin, hole_end = tl.load(edges_ptr + 1).to(tl.int32), tl.load(edges_ptr + 2).to(tl.int32)
    for first in tl.range(0, count, KEYS, num_stages=STAGES):
        key = first + tl.arange(0, KEYS)
        inside_list = key < count
        read = inside_list[:, None] & (column < DIM)
        place = key
        if AMONG:
            key = tl.load(numbers_ptr + place, mask=inside_list, other=0)
        x = tl.load(keys_ptr + key[:, None] * DIM + column, mask=read, other=0.0)
        score = tl.dot(x, query, input_precision=PRECISION) - bar[None, :]
        best = tl.max(tl.reshape(score, (KEYS, GROUPS, LISTS)), 1)
        wide = x.to(tl.float32)
        extra = DEVIATIONS * tl.sqrt(tl.dot((wide * wide).to(x.dtype), spread, input_precision=PRECISION))
        if WITHIN:
            variance = tl.load(variance_ptr + key[:, None] * DIM + column, mask=read, other=0.0)
            extra = tl.dot(variance, tl.trans(half), extra, input_precision=PRECISION)
        log_value = tl.load(log_value_ptr + key, mask=inside_list, other=0.0)
        log_share = best + extra + log_value[:, None]
        share = tl.exp2(tl.minimum(log_share, 80.0 if TOGETHER else 0.0) * 1.4426950408889634)
        told = key[:, None] < known[None, :]
        if AMONG:
            told = told & inside_list[:, None]
        share = tl.where(told, share, -1.0 if TOGETHER else 0.0)
        if TOGETHER:
            left = ((key >= left_begin) & (key < hole_begin)) | ((key >= hole_end) & (key < left_end))
            # a share of 80 nats or more is as good as any
            largest = tl.where(left, tl.max(share, 1), -1.0)
            tl.store(share_ptr + place, largest.to(share_ptr.dtype.element_ty))
        else:
            tl.store(share_at + place[:, None], share.to(share_ptr.dtype.element_ty))
    return count
