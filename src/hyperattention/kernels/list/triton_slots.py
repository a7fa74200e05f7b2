"""Shared parts of the Triton list kernels: the key index of a slot, the address of that key, and masks of scores.

A *group* is one `Runs`; the groups of a selection are passed as tuples, so that a kernel is compiled for their number and
kind, and one launch processes all of them. Key indices of runs are computed in the kernel and not stored: a window is one
first key.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

# beyond every key and every place
NEVER = tl.constexpr(2**31 - 1)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def stored_at(tile, row, tiles, rows, size):
    """Return the memory row of a tile's row in queries and results: ordered by head of a group, then by position."""
    return (tile // tiles) * tiles * rows + (row // size) * (tiles * size) + (tile % tiles) * size + row % size


@triton.jit
def slots_of(
    first, weight, low, high, hole, tile, num_tiles, at, slots, RUN: tl.constexpr, HOLED: tl.constexpr, BLOCK: tl.constexpr
):
    """Return key indices and log-weights of `BLOCK` slots from `at` on; key 0 and -inf if a slot does not count."""
    # RUN is the length of every run, or 0 for a single run of any length: then one compilation supports every length
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
def ranges_of(
    firsts, weights, lows, highs, slots, tile, least, CAUSAL: tl.constexpr, RANGES: tl.constexpr
):  # fmt: skip
    """Return the ranges of keys of a tile, its leading groups, and their log-weights: see `flat_form.FlatLists`.

    Keys before `least` are seen by every row.
    """
    begin, length, begin_2, total = least * 0, least * 0, least * 0, least * 0
    special, causal_from = least * 0 + NEVER, least * 0 + NEVER
    weight, weight_2 = 0.0, 0.0
    for g in tl.static_range(RANGES):
        start = tl.maximum(tl.load(firsts[g] + tile), tl.load(lows[g] + tile)).to(tl.int32)
        end = tl.minimum(tl.load(firsts[g] + tile) + slots[g], tl.load(highs[g] + tile)).to(tl.int32)
        log_weight = tl.load(weights[g] + tile) * LOG2_E
        count = tl.where(log_weight == -float("inf"), 0, tl.maximum(end - start, 0))
        if CAUSAL[g]:
            causal_from = tl.minimum(causal_from, total)
            reached = tl.where(end > least, total + tl.maximum(least - start, 0), NEVER)
            special = tl.minimum(special, tl.where(count > 0, reached, NEVER))
        if g == 0:
            begin, length, weight, weight_2 = start, count, log_weight, log_weight
        else:
            begin_2, weight_2 = start, log_weight
            special = tl.minimum(special, tl.where((count > 0) & (weight_2 != weight), total, NEVER))
        total += count
    return begin, length, begin_2, total, special, causal_from, weight, weight_2


@triton.jit
def blocks_of(first, low, high, tile, slots, begin, end, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """Reduce a range of blocks of slots of a single run to the blocks with a key that counts."""
    if RUN == 0:
        start = tl.load(first + tile)
        begin = tl.maximum(begin, ((tl.load(low + tile) - start) // BLOCK).to(tl.int32))
        end = tl.minimum(end, ((tl.load(high + tile) - start + BLOCK - 1) // BLOCK).to(tl.int32))
    return begin, end


@triton.jit
def places_of(index, row, table, pages, heads, s_page, s_head, s_slot, PAGE: tl.constexpr):
    """Return the address offsets of keys: in row `row` of the keys, or, if `PAGE` > 0, in the pages of a table."""
    if PAGE == 0:
        return row * s_page + index.to(tl.int64) * s_slot
    # slots that do not count have key 0, which exists in the table; Triton 3.6 fails to compile a mask here
    page = tl.load(table + (row // heads) * pages + index // PAGE).to(tl.int64)
    return page * s_page + (row % heads) * s_head + (index % PAGE).to(tl.int64) * s_slot


@triton.jit
def allowed(
    score, index, limit, row_label, key_label, gap_low, gap_high,
    CAUSAL: tl.constexpr, LABELLED: tl.constexpr, GAP: tl.constexpr,
):  # fmt: skip
    """Overwrite scores of pairs that are not allowed with -inf; tensors of keys and of rows must broadcast."""
    if CAUSAL:
        score = tl.where(index < limit, score, -float("inf"))
    if GAP:
        score = tl.where((index >= gap_low) & (index < gap_high), -float("inf"), score)
    if LABELLED:
        score = tl.where(row_label == key_label, -float("inf"), score)
    return score


@triton.jit
def labels_of(key_label, index, live, LABELLED: tl.constexpr):
    """Load the labels of keys, if there are labels."""
    if LABELLED:
        return tl.load(key_label + index, mask=live, other=0)
    return index.to(tl.int64)
