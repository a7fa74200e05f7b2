"""Numbers of keys and of blocks of keys for a choice for alike queries, in Triton: what is scored, and what is opened.

`select.score.alike_scan.TileScan.opened` does the same in PyTorch.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def number_blocks(numbers_ptr, count, BLOCK: tl.constexpr):
    """Write the numbers of the first `count` blocks."""
    for first in tl.range(0, count, BLOCK):
        number = first + tl.arange(0, BLOCK)
        tl.store(numbers_ptr + number, number, mask=number < count)


@triton.jit
def open_blocks(opened_ptr, numbers_ptr, opened, begin, until, BLOCK: tl.constexpr):
    """Write the numbers of the four blocks in each opened one, and behind them those from `begin` to `until`.

    Args:
        opened_ptr: numbers of the blocks that are opened, ascending.
        numbers_ptr: for the numbers of smaller blocks, ascending.
        opened: how many are opened.
        begin: the first small block behind the last whole large one.
        until: the end of the small blocks that are whole.
        BLOCK: numbers written at once.

    Returns:
        how many numbers were written.
    """
    inside = 4 * opened
    count = inside + until - begin
    for first in tl.range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        large = tl.load(opened_ptr + place // 4, mask=place < inside, other=0)
        number = tl.where(place < inside, 4 * large + place % 4, begin + place - inside)
        tl.store(numbers_ptr + place, number, mask=place < count)
    return count


@triton.jit
def keep_left(numbers_ptr, count, begin, hole_begin, hole_end, end, BLOCK: tl.constexpr):
    """Keep the numbers of keys that earlier stages left, in their order.

    Args:
        numbers_ptr: numbers of keys, ascending: changed.
        count: how many there are.
        begin: the first key that is left.
        hole_begin: the end of what is left before a hole.
        hole_end: the first key behind the hole.
        end: the end of what is left.
        BLOCK: numbers read at once.

    Returns:
        how many are kept.
    """
    written = tl.zeros([], tl.int32)
    for first in tl.range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        key = tl.load(numbers_ptr + place, mask=place < count, other=0)
        left = ((key >= begin) & (key < hole_begin)) | ((key >= hole_end) & (key < end))
        left = left & (place < count)
        running = tl.cumsum(left.to(tl.int32), 0)
        # all are read before some are written in their place
        tl.debug_barrier()
        tl.store(numbers_ptr + written + running - 1, key, mask=left)
        written += tl.sum(left.to(tl.int32), 0)
        tl.debug_barrier()
    return written
