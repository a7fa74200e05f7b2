"""Shares of keys, or of blocks of keys, for lists of alike queries in Triton: scores are not written to memory.

A program scores them by the averages of some lists of a tile, as `select.score.alike_scan` does in PyTorch: the largest
normalised score over the groups of a list, an allowance for what averages and blocks hide, and the exponential of both.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def share_keys(
    query_ptr, bar_ptr, spread_ptr, keys_ptr, variance_ptr, log_value_ptr, numbers_ptr, share_ptr, edge_ptr,
    lists, room, size, count,
    OF_LIST: tl.constexpr, DIM: tl.constexpr, DEVIATIONS: tl.constexpr, WITHIN: tl.constexpr, LISTS: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Estimate the largest share that a query of each of some lists gives a key: see `AlikeScan.shares`.

    Args:
        query_ptr: averages of each group, ``[LISTS, OF_LIST, DIM]``.
        bar_ptr: what each average's scores are compared with, ``[LISTS, OF_LIST]``, float32.
        spread_ptr: what averages leave out, beside half of their squares, ``[LISTS, 2 * DIM]``.
        keys_ptr: means of blocks, ``[blocks, DIM]``.
        variance_ptr: variances inside blocks, of the same shape; not read without `WITHIN`.
        log_value_ptr: logarithm of how far values lie.
        numbers_ptr: numbers of the blocks to score.
        share_ptr: for the shares, ``[LISTS, room]``, and zeros up to a multiple of `KEYS`; with `WITHIN` for the largest of
            all lists, ``[count]``, which may exceed 1, is 0 where earlier stages left no key of a block, and -1 behind them.
        edge_ptr: edges of what earlier stages left; not read without `WITHIN`.
        lists: number of lists.
        room: places of a list in `share_ptr`, a multiple of `KEYS`.
        size: keys in a block.
        count: blocks to score.
        OF_LIST: averages of a list.
        DIM: numbers of a key.
        DEVIATIONS: deviations by which a query may exceed the average of its group.
        WITHIN: whether blocks have several keys, and the largest share of all lists is wanted.
        LISTS: most lists, which share the keys that are read.
        GROUPS: `OF_LIST`, padded to a power of two.
        WIDTH: `DIM`, padded.
        KEYS: blocks read at once.
        STAGES: blocks of keys that are on their way.
        PRECISION: of products.
    """
    column = tl.arange(0, WIDTH)[None, :]
    # averages: all lists of a group stand together, so that the largest over groups is found inside a thread
    average = tl.arange(0, LISTS * GROUPS)
    group, of = average // LISTS, average % LISTS
    there = (of < lists) & (group < OF_LIST)
    at = of * OF_LIST + group
    query = tl.load(query_ptr + at[:, None] * DIM + column, mask=there[:, None] & (column < DIM), other=0.0)
    # what is no average is below any score
    bar = tl.load(bar_ptr + at, mask=there, other=float("inf"))
    one = tl.arange(0, LISTS)
    spread_at = spread_ptr + one[:, None] * (2 * DIM) + column
    inside = (one < lists)[:, None] & (column < DIM)
    spread = tl.trans(tl.load(spread_at, mask=inside, other=0.0))
    query = tl.trans(query)
    if WITHIN:
        # over all lists: by its own a sharp one would take blocks from the others
        half = tl.sum(tl.load(spread_at + DIM, mask=inside, other=0.0).to(tl.float32), 0) / lists
        left_begin, left_end = tl.load(edge_ptr).to(tl.int32), tl.load(edge_ptr + 3).to(tl.int32)
        hole_begin, hole_end = tl.load(edge_ptr + 1).to(tl.int32), tl.load(edge_ptr + 2).to(tl.int32)
    for first in tl.range(0, count, KEYS, num_stages=STAGES):
        place = first + tl.arange(0, KEYS)
        told = place < count
        read = told[:, None] & (column < DIM)
        key = tl.load(numbers_ptr + place, mask=told, other=0)
        x = tl.load(keys_ptr + key[:, None] * DIM + column, mask=read, other=0.0)
        score = tl.dot(x, query, input_precision=PRECISION) - bar[None, :]
        best = tl.max(tl.reshape(score, (KEYS, GROUPS, LISTS)), 1)
        wide = x.to(tl.float32)
        square = wide * wide
        if WITHIN:
            variance = tl.load(variance_ptr + key[:, None] * DIM + column, mask=read, other=0.0)
            square += variance.to(tl.float32)
        extra = DEVIATIONS * tl.sqrt(tl.dot(square.to(x.dtype), spread, input_precision=PRECISION))
        log_value = tl.load(log_value_ptr + key, mask=told, other=0.0).to(tl.float32)
        if WITHIN:
            log_value += tl.sum(variance.to(tl.float32) * half[None, :], 1)
        log_share = best + extra + log_value[:, None]
        if WITHIN:
            first_key = key * size
            behind, last = first_key + size, tl.maximum(first_key, hole_end)
            left = (tl.minimum(behind, hole_begin) > tl.maximum(first_key, left_begin)) | (
                tl.minimum(behind, left_end) > last
            )
            # a share of 80 nats or more is as good as any
            share = tl.exp2(tl.minimum(tl.max(log_share, 1), 80.0) * 1.4426950408889634)
            share = tl.where(told, tl.where(left, share, 0.0), -1.0)
            tl.store(share_ptr + place, share.to(share_ptr.dtype.element_ty))
        else:
            share = tl.exp2(tl.minimum(log_share, 0.0) * 1.4426950408889634)
            share = tl.where(told[:, None], share, 0.0)
            share_at = share_ptr + one[None, :] * room + place[:, None]
            tl.store(share_at, share.to(share_ptr.dtype.element_ty))
