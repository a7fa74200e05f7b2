"""The best pages of a decoding step in Triton, from scores in memory, inside the kernel that reads their keys.

The number of a score's order is held in registers for every page. The bar that as many pages reach as are wanted is found
bit by bit, and two running sums give each page its place: nothing is sorted.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def ranks_of(score_ptr, block_ptr, tile, group, pages, blocks, bar, PAGE: tl.constexpr, PAGES: tl.constexpr):
    """Return a number for every page that is ordered as its score; the smallest number for pages not to be chosen."""
    page = tl.arange(0, PAGES)
    there = page < pages
    # the log-sum-exp of a block of pages: there are at least 16 pages in a block
    block = tl.arange(0, PAGES // 16)
    best = tl.full([PAGES], -float("inf"), tl.float32)
    for head in tl.range(0, group):
        at = tile.to(tl.int64) * group + head
        lse = tl.load(block_ptr + at * blocks + block, mask=block < blocks, other=-float("inf"))
        top = tl.max(lse, 0)
        whole = top + tl.log(tl.sum(tl.exp(lse - top), 0))
        best = tl.maximum(best, tl.load(score_ptr + at * pages + page, mask=there, other=-float("inf")) - whole)
    # pages before the bar lie within sinks or padding
    free = there & ((page + 1) * PAGE > bar) & (best > -float("inf"))
    bits = best.to(tl.int32, bitcast=True)
    return tl.where(free, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -2147483648)


@triton.jit
def choose(rank, chosen_ptr, num, PAGES: tl.constexpr, WRITTEN: tl.constexpr):
    """Write the numbers of the `num` best pages in ascending order, after -1 for every page that is missing."""
    count = tl.minimum(num, tl.sum((rank > -2147483648).to(tl.int32), 0))
    # the largest number that `count` pages reach, bit by bit from the sign on
    least = tl.where(tl.sum((rank >= 0).to(tl.int32), 0) >= count, 0, -2147483648)
    for bit in tl.range(0, 31):
        step = least + (1 << (30 - bit))
        least = tl.where(tl.sum((rank >= step).to(tl.int32), 0) >= count, step, least)
    above, level = rank > least, rank == least
    quota = count - tl.sum(above.to(tl.int32), 0)
    # both running sums in one number: there are fewer than 2**15 pages
    passed = tl.cumsum(above.to(tl.int32) + (level.to(tl.int32) << 16), 0)
    level_passed = passed >> 16
    hit = above | (level & (level_passed <= quota))
    place = (passed & 0xFFFF) + tl.minimum(level_passed, quota) - 1 + num - count
    tl.store(chosen_ptr + place, tl.arange(0, PAGES), mask=hit)
    for first in tl.range(0, num - count, WRITTEN):
        missing = first + tl.arange(0, WRITTEN)
        tl.store(chosen_ptr + missing, tl.full([WRITTEN], -1, tl.int32), mask=missing < num - count)
