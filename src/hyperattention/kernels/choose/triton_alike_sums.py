"""Sums of exponentials of averages' scores over blocks of keys, in Triton: no score is written to memory.

The sum of a block is estimated by its mean and its variances, as `select.score.alike_scan` does in PyTorch.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def sum_blocks(
    query_ptr, spread_ptr, log_rows_ptr, keys_ptr, variance_ptr, numbers_ptr, bar_ptr, first_average, lists, count, size,
    bound,
    OF_LIST: tl.constexpr, DIM: tl.constexpr, WITHIN: tl.constexpr, LESS: tl.constexpr,
    LISTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add sums over some blocks to what averages' scores are compared with, or take them away: see `AlikeScan.shares`.

    Args:
        query_ptr: averages of each group of some lists, ``[lists, OF_LIST, DIM]``.
        spread_ptr: what they leave out, beside half of their squares, ``[lists, 2 * DIM]``.
        log_rows_ptr: half the logarithm of the queries in each, ``[lists, OF_LIST]``, float32.
        keys_ptr: means of blocks, ``[blocks, DIM]``.
        variance_ptr: variances inside blocks, of the same shape; not read without `WITHIN`.
        numbers_ptr: numbers of the blocks.
        bar_ptr: what scores are compared with, the logarithm of a sum less that of the queries, float32: changed.
        first_average: the first of the averages.
        lists: number of lists.
        count: number of blocks.
        size: keys in a block.
        bound: of the result; a sum of nothing has it below zero.
        OF_LIST: averages of a list.
        DIM: numbers of a key.
        WITHIN: whether blocks have several keys.
        LESS: whether sums are taken away, of blocks that they hold.
        LISTS: most lists.
        ROWS: averages of this call.
        WIDTH: `DIM`, padded to a power of two.
        BLOCKS: blocks read at once.
        PRECISION: of products.
    """
    average, column = first_average + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    there = average < lists * OF_LIST
    inside = there[:, None] & (column < DIM)[None, :]
    query = tl.load(query_ptr + average[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    if WITHIN:
        one = tl.arange(0, LISTS)
        half_at = spread_ptr + one[:, None] * (2 * DIM) + DIM + column[None, :]
        half_of = tl.load(half_at, mask=(one < lists)[:, None] & (column < DIM)[None, :], other=0.0).to(tl.float32)
        # over all lists: by its own a sharp one would take blocks from the others
        half_of = tl.sum(half_of, 0)[:, None] / lists
    log_size = tl.log(size.to(tl.float32))
    largest, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for first in tl.range(0, count, BLOCKS, num_stages=2):
        place = first + tl.arange(0, BLOCKS)
        block = tl.load(numbers_ptr + place, mask=place < count, other=0)
        read = (place < count)[None, :] & (column < DIM)[:, None]
        at = block[None, :] * DIM + column[:, None]
        score = tl.dot(query, tl.load(keys_ptr + at, mask=read, other=0.0), input_precision=PRECISION)
        if WITHIN:
            half = tl.sum(tl.load(variance_ptr + at, mask=read, other=0.0).to(tl.float32) * half_of, 0)
            # normal scores, and sums of their few largest where these are more than all others: Derrida, 1981
            few = tl.sqrt(4.0 * log_size * half) - log_size
            score += tl.where(half <= log_size, half, few)[None, :]
        score = tl.where((place < count)[None, :], score, -float("inf"))
        higher = tl.maximum(largest, tl.max(score, 1))
        # nothing known yet: any finite number will do
        base = tl.where(higher > -float("inf"), higher, 0.0)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(score - base[:, None]), 1)
        largest = higher
    own = tl.where(total > 0, largest + tl.log(tl.maximum(total, 1.1754943508222875e-38)) + log_size, -bound)
    log_rows = tl.load(log_rows_ptr + average, mask=there, other=0.0)
    before = tl.load(bar_ptr + average, mask=there, other=0.0) + log_rows
    if LESS:
        # what a sum was made of is no more than it, but for rounding
        rest = 1.0 - tl.exp(tl.minimum(own - before, 0.0))
        together = tl.where(rest > 0, before + tl.log(tl.maximum(rest, 1.1754943508222875e-38)), -bound)
    else:
        most = tl.maximum(before, own)
        together = most + tl.log(tl.exp(before - most) + tl.exp(own - most))
    tl.store(bar_ptr + average, tl.minimum(tl.maximum(together - log_rows, -bound), bound), mask=there)
