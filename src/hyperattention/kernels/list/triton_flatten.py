"""From a selection to ranges and flat lists, in one launch: a program a tile writes what `triton_flat` reads.

Slots that do not count are left out, so that a flat list is as long as what it lists, and a running sum over a group tells
where each key goes. Reads 12 bytes a drawn key and writes 8.
"""
# what a kernel may write is Triton's language, which its own stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from hyperattention.kernels.launch import Launch, groups_of
from hyperattention.kernels.list.flat_form import BLOCK, FlatForm, FlatLists
from hyperattention.kernels.list.triton_slots import LOG2_E, NEVER, ranges_of, slots_of

# slots that a program takes at a time
_CHUNK = 1024
_ROWS = 256
HEADER = tl.constexpr(8)


@triton.jit
def _flatten_kernel(
    firsts, weights, lows, highs, holes, slots, limit_ptr, header_ptr, range_weight_ptr, index_ptr, weight_ptr,
    num_tiles, rows,
    RUNS: tl.constexpr, HOLED: tl.constexpr, CAUSAL: tl.constexpr, CHUNKS: tl.constexpr, TESTED: tl.constexpr,
    RANGES: tl.constexpr, CAPACITY: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    # keys before the least limit are seen by every row
    least = tl.full([], NEVER, tl.int32)
    if TESTED:
        for at in tl.range(0, rows, ROWS):
            row = at + tl.arange(0, ROWS)
            limit = tl.load(limit_ptr + tile * rows + row, mask=row < rows, other=NEVER)
            least = tl.minimum(least, tl.min(limit, 0)).to(tl.int32)

    begin, length, begin_2, total, special, causal_from, weight, weight_2 = ranges_of(
        firsts, weights, lows, highs, slots, tile, least, CAUSAL, RANGES
    )
    index_ptr += tile * CAPACITY
    weight_ptr += tile * CAPACITY
    listed, tested, last = least * 0, least * 0, least * 0
    for phase in tl.static_range(0 if TESTED else 1, 2):
        # first the keys that some row may not see
        for g in tl.static_range(RANGES, len(RUNS)):
            if phase == 1 or CAUSAL[g]:
                for at in tl.range(0, slots[g], CHUNKS[g]):
                    index, bias = slots_of(
                        firsts[g], weights[g], lows[g], highs[g], holes[g], tile, num_tiles, at, slots[g],
                        RUNS[g], HOLED[g], CHUNKS[g],
                    )  # fmt: skip
                    # a weight that is not a number is listed, and seen
                    live = bias != -float("inf")
                    if CAUSAL[g]:
                        live &= (index >= least) == (phase == 0)
                    place = listed + tl.cumsum(live.to(tl.int32), 0) - 1
                    tl.store(index_ptr + place, index, mask=live)
                    tl.store(weight_ptr + place, bias * LOG2_E, mask=live)
                    listed += tl.sum(live.to(tl.int32), 0)
                    last = tl.maximum(last, tl.max(tl.where(live, index, 0), 0))
        if phase == 0:
            tested = listed
    place = listed + tl.arange(0, PAD)
    empty = place < tl.cdiv(listed, PAD) * PAD
    tl.store(index_ptr + place, last, mask=empty)
    tl.store(weight_ptr + place, -float("inf"), mask=empty)

    header_ptr += tile * HEADER
    tl.store(header_ptr, begin)
    tl.store(header_ptr + 1, length)
    tl.store(header_ptr + 2, begin_2)
    tl.store(header_ptr + 3, total)
    tl.store(header_ptr + 4, special)
    tl.store(header_ptr + 5, causal_from)
    tl.store(header_ptr + 6, listed)
    tl.store(header_ptr + 7, tested)
    tl.store(range_weight_ptr + tile * 2, weight)
    tl.store(range_weight_ptr + tile * 2 + 1, weight_2)


def flatten(form: FlatForm) -> FlatLists:
    """Write a selection as ranges and flat lists.

    Args:
        form: the selection, laid out.

    Returns:
        what the fast kernel reads.
    """
    flat = empty_flat(form)
    launch_flatten(form, flat).run()
    return flat


def empty_flat(form: FlatForm) -> FlatLists:
    """Make room for the flat lists of a selection.

    Args:
        form: the selection, laid out.

    Returns:
        flat lists, to be written.
    """
    limit = form.lists.row_limit
    tiles = limit.shape[0] * limit.shape[1]
    header = limit.new_empty((tiles, 8), dtype=torch.int32)
    range_weight = limit.new_empty((tiles, 2), dtype=torch.float32)
    index = limit.new_empty((tiles, form.capacity), dtype=torch.int32)
    log_weight = limit.new_empty((tiles, form.capacity), dtype=torch.float32)
    return FlatLists(header, range_weight, index, log_weight)


def launch_flatten(form: FlatForm, flat: FlatLists) -> Launch:
    """Prepare the launch, so that it can be run, or compiled for another machine.

    Args:
        form: the selection, laid out.
        flat: flat lists, to be written.

    Returns:
        the launch.
    """
    groups = groups_of(form.lists, _CHUNK)
    del groups["LABELLED"]
    chunks = groups.pop("BLOCKS")
    limit = form.lists.row_limit.contiguous()
    return Launch(
        _flatten_kernel,
        (len(flat.header),),
        {
            **groups, "CHUNKS": chunks, "limit_ptr": limit,
            "header_ptr": flat.header, "range_weight_ptr": flat.range_weight, "index_ptr": flat.index,
            "weight_ptr": flat.log_weight, "num_tiles": len(flat.header), "rows": limit.shape[2],
            "TESTED": any(form.lists.causal), "RANGES": form.num_ranges, "CAPACITY": form.capacity, "PAD": BLOCK,
            "ROWS": min(_ROWS, max(16, triton.next_power_of_2(limit.shape[2]))), "num_warps": 4,
        },
    )  # fmt: skip
