"""What the Triton list kernels share: which key a slot names, where that key lies in memory, and the scores of some slots.

A *group* is one `Runs`; the groups of a selection are handed over as tuples, so that a kernel is compiled for their number
and kind, and one launch serves them all. Indices of runs are computed, never written out: a window is one first key.
"""
# what a kernel may write is Triton's language, which its own stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def stored_at(tile, row, tiles, rows, size):
    """Number a row of a tile where queries and results lie: head after head of a group, each one's positions in order."""
    return (tile // tiles) * tiles * rows + (row // size) * (tiles * size) + (tile % tiles) * size + row % size


@triton.jit
def slots_of(
    first, weight, low, high, hole, tile, num_tiles, at, slots, RUN: tl.constexpr, HOLED: tl.constexpr, BLOCK: tl.constexpr
):
    """Name the keys of `BLOCK` slots from `at` on, with their log-weights; -inf, and key 0, where a slot does not count."""
    # RUN is the length of every run, or 0 for a single run of any length, whose compilation then serves every length
    slot = at + tl.arange(0, BLOCK)
    there = slot < slots
    if RUN == 0:
        index = (tl.load(first + tile) + slot).to(tl.int32)
        bias = tl.where(there, tl.load(weight + tile), -float("inf"))
    else:
        runs = slots // RUN
        index = (tl.load(first + tile * runs + slot // RUN, mask=there, other=0) + slot % RUN).to(tl.int32)
        bias = tl.load(weight + tile * runs + slot // RUN, mask=there, other=-float("inf"))
    live = (index >= tl.load(low + tile)) & (index < tl.load(high + tile))
    if HOLED:
        live &= (index < tl.load(hole + tile)) | (index >= tl.load(hole + num_tiles + tile))
    bias = tl.where(live, bias, -float("inf"))
    return tl.where(live, index, 0), bias


@triton.jit
def blocks_of(first, low, high, tile, slots, begin, end, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """Narrow a range of blocks of slots to those of a single run that hold a key which counts."""
    if RUN == 0:
        start = tl.load(first + tile)
        begin = tl.maximum(begin, ((tl.load(low + tile) - start) // BLOCK).to(tl.int32))
        end = tl.minimum(end, ((tl.load(high + tile) - start + BLOCK - 1) // BLOCK).to(tl.int32))
    return begin, end


@triton.jit
def places_of(index, row, table, pages, heads, s_page, s_head, s_slot, PAGE: tl.constexpr):
    """Return where keys begin in memory: in row `row` of the keys, or, where `PAGE` > 0, in the pages that a table names."""
    if PAGE == 0:
        return row * s_page + index.to(tl.int64) * s_slot
    # slots that do not count name key 0, whose entry there is; Triton 3.6 fails to compile a mask here
    page = tl.load(table + (row // heads) * pages + index // PAGE).to(tl.int64)
    return page * s_page + (row % heads) * s_head + (index % PAGE).to(tl.int64) * s_slot


@triton.jit
def allowed(
    score, index, limit, row_label, key_label, gap_low, gap_high,
    CAUSAL: tl.constexpr, LABELLED: tl.constexpr, GAP: tl.constexpr,
):  # fmt: skip
    """Overwrite scores of pairs that may not meet with -inf; what belongs to keys and to rows comes shaped to broadcast."""
    if CAUSAL:
        score = tl.where(index < limit, score, -float("inf"))
    if GAP:
        score = tl.where((index >= gap_low) & (index < gap_high), -float("inf"), score)
    if LABELLED:
        score = tl.where(row_label == key_label, -float("inf"), score)
    return score


@triton.jit
def labels_of(key_label, index, live, LABELLED: tl.constexpr):
    """Fetch the labels of keys, where there are any."""
    if LABELLED:
        return tl.load(key_label + index, mask=live, other=0)
    return index.to(tl.int64)
