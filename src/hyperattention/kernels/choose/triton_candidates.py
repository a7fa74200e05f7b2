"""Find the blocks of a tile's largest shares in Triton, without a sort.

`select.score.alike_scan` does the same in PyTorch, where equal shares may be chosen in another order.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def _bits(share_ptr, first, count, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Read shares as integers of the same order; those below 0 are never found."""
    key = first + tl.arange(0, BLOCK)
    share = tl.load(share_ptr + key, mask=key < count, other=-1.0)
    # wide enough for the largest threshold
    bits = share.to(tl.int32, bitcast=True).to(tl.int64) if BITS > 16 else share.to(tl.int16, bitcast=True).to(tl.int32)
    return key, bits


@triton.jit
def find_largest(
    share_ptr, numbers_ptr, found_ptr, count, wanted,
    BITS: tl.constexpr, DIGIT: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the numbers of the largest shares, ascending; of equal ones the first.

    Args:
        share_ptr: shares, ``[count]``; below 0 where none is to be found.
        numbers_ptr: numbers of what has these shares, ascending.
        found_ptr: for the numbers of the largest, int32.
        count: how many have shares.
        wanted: most numbers.
        BITS: bits of a share.
        DIGIT: bits of the threshold that are found in one pass over all shares.
        COUNTED: shares that are compared at once.
        BLOCK: shares that are placed at once.

    Returns:
        how many numbers were written.
    """
    digit = tl.arange(0, 1 << DIGIT)
    # the largest threshold that enough shares reach, and how many lie above it
    least, above = tl.zeros([], tl.int64 if BITS > 16 else tl.int32), tl.zeros([], tl.int32)
    steps: tl.constexpr = (BITS - 1 + DIGIT - 1) // DIGIT
    sign: tl.constexpr = 2 * BITS - 1
    for step in tl.range(0, steps):
        shift = (steps - 1 - step) * DIGIT
        bar = least + (digit.to(least.dtype) << shift)
        passed = tl.zeros([1 << DIGIT, COUNTED], tl.int32)
        for first in tl.range(0, count, COUNTED, num_stages=3):
            _, bits = _bits(share_ptr, first, count, BITS, COUNTED)
            # the sign of the difference, which is cheaper than a comparison
            passed -= ((bar[:, None] - 1 - bits[None, :]) >> sign).to(tl.int32)
        total = tl.sum(passed, 1)
        one = tl.sum(((total >= wanted) & (digit > 0)).to(tl.int32), 0)
        # shares from the next threshold on
        above = tl.maximum(above, tl.sum(tl.where(digit == one + 1, total, 0), 0))
        least += one.to(least.dtype) << shift
    ties, written = tl.maximum(wanted - above, 0), tl.zeros([], tl.int32)
    seen = tl.zeros([], tl.int32)
    for first in tl.range(0, count, BLOCK, num_stages=3):
        key, bits = _bits(share_ptr, first, count, BITS, BLOCK)
        larger, equal = bits > least, bits == least
        # both running sums at once
        of_key = larger.to(tl.int32) | (equal.to(tl.int32) << 16)
        running, in_all = tl.cumsum(of_key, 0), tl.sum(of_key, 0)
        tied, before = seen + (running >> 16), tl.minimum(seen, ties)
        place = written - before + (running & 0xFFFF) + tl.minimum(tied, ties)
        chosen = larger | (equal & (tied <= ties))
        number = tl.load(numbers_ptr + key, mask=chosen, other=0)
        tl.store(found_ptr + place - 1, number, mask=chosen)
        seen += in_all >> 16
        written += (in_all & 0xFFFF) + tl.minimum(seen, ties) - before
    return written
