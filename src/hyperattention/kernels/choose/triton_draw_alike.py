"""Draw keys for lists of alike queries in Triton: the law of `select.score.stretches`, its running sum and its inversion.

A program draws for one list. It reads the list's shares several times, a part at a time, mostly out of the cache.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch

# blocks of keys read at once, or slots written where all keys are listed; and blocks whose draws are placed at once, which
# take more registers, most of all where a block has several keys
_BLOCKS, _PLACED, _PLACED_OF_SEVERAL = 1024, 512, 256
# the sum of a law in fixed point, whose running sums are exact in any order
_UNITS = 2**30


@triton.jit
def _room(block, begin, hole_begin, hole_end, end, SIZE: tl.constexpr):
    """Return how many keys of a block are left before the hole, and how many behind it."""
    first = block * SIZE
    before = tl.minimum(first + SIZE, hole_begin) - tl.maximum(first, begin)
    behind = tl.minimum(first + SIZE, end) - tl.maximum(first, hole_end)
    return tl.maximum(before, 0), tl.maximum(behind, 0)


@triton.jit
def _total(share_ptr, most, known, begin, hole_begin, hole_end, end, SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """Add up the shares of all keys, none above `most`."""
    total = tl.zeros([BLOCKS], tl.float32)
    for first in tl.range(0, known, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        share = tl.load(share_ptr + block, mask=block < known, other=0.0).to(tl.float32)
        before, behind = _room(block, begin, hole_begin, hole_end, end, SIZE)
        total += tl.minimum(share, most) * (before + behind).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def _units(share_ptr, block, known, room, most, scale, evenly, unit):
    """Return how often a block is to be listed, in fixed point: no key of it more than once, and each at times."""
    share = tl.load(share_ptr + block, mask=block < known, other=0.0).to(tl.float32)
    each = tl.minimum(tl.minimum(share, most) * scale + evenly, 1.0)
    units = (each * room.to(tl.float32) * unit + 0.5).to(tl.int32)
    return tl.where(room > 0, tl.maximum(units, 1), 0)


@triton.jit
def _kernel(
    share_ptr, edges_ptr, noise_ptr, index_ptr, weight_ptr, low_ptr, high_ptr, room, num, even, least,
    s_edges, s_noise, s_index, s_weight, s_low, EDGES: tl.constexpr,
    MANY: tl.constexpr, SIZE: tl.constexpr, ROUNDS: tl.constexpr, UNITS: tl.constexpr,
    BLOCKS: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    row, one = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tile = row // MANY
    edges_ptr += one * s_edges + tile * EDGES
    begin = tl.load(edges_ptr)
    end = tl.load(edges_ptr + 3)
    tl.store(low_ptr + one * s_low + row, begin)
    tl.store(high_ptr + one * s_low + row, end)
    begin, end = begin.to(tl.int32), end.to(tl.int32)
    hole_begin = tl.load(edges_ptr + 1).to(tl.int32)
    hole_end = tl.load(edges_ptr + 2).to(tl.int32)
    known = tl.load(edges_ptr + 4).to(tl.int32) // SIZE
    count = hole_begin - begin + end - hole_end
    share_ptr += (one * tl.num_programs(0) + row) * room
    index_ptr += one * s_index + row * num
    weight_ptr += one * s_weight + row * num
    if count <= num:
        # all that is left is listed
        for first in tl.range(0, num, BLOCKS):
            slot = first + tl.arange(0, BLOCKS)
            key = begin + tl.minimum(slot, tl.maximum(count - 1, 0))
            key += tl.where(key >= hole_begin, hole_end - hole_begin, 0)
            tl.store(index_ptr + slot, key.to(tl.int64), mask=slot < num)
            tl.store(weight_ptr + slot, tl.where(slot < count, 0.0, -float("inf")), mask=slot < num)
    else:
        weighted = (1.0 - even) * num
        most = float("inf")
        total = _total(share_ptr, most, known, begin, hole_begin, hole_end, end, SIZE, BLOCKS)
        for _ in tl.static_range(ROUNDS):
            most = total / weighted
            total = _total(share_ptr, most, known, begin, hole_begin, hole_end, end, SIZE, BLOCKS)
        scale = weighted / tl.maximum(total, least)
        # where nothing was scored this is all there is, and all draws are even
        evenly = even * num / count.to(tl.float32)
        unit = UNITS / num
        blocks = tl.cdiv(end, SIZE)
        in_all = tl.zeros([BLOCKS], tl.int32)
        for first in tl.range(0, blocks, BLOCKS):
            block = first + tl.arange(0, BLOCKS)
            before, behind = _room(block, begin, hole_begin, hole_end, end, SIZE)
            in_all += _units(share_ptr, block, known, before + behind, most, scale, evenly, unit)
        # draws of a unit; float64, for float32 cannot place a point to a small part of a draw
        ratio = num / tl.sum(in_all, 0).to(tl.float64)
        noise = tl.load(noise_ptr + one * s_noise + row)
        passed_units = 0
        for first in tl.range(0, blocks, PLACED):
            block = first + tl.arange(0, PLACED)
            before, behind = _room(block, begin, hole_begin, hole_end, end, SIZE)
            units = _units(share_ptr, block, known, before + behind, most, scale, evenly, unit)
            until = passed_units + tl.cumsum(units, 0)
            # points before the block, and before its end
            since = (until - units).to(tl.float64) * ratio - noise
            slot = tl.minimum(tl.maximum(tl.ceil(since).to(tl.int32), 0), num)
            ends = tl.minimum(tl.maximum(tl.ceil(until.to(tl.float64) * ratio - noise).to(tl.int32), 0), num)
            # at least one, for what is never hit
            left = tl.maximum(before + behind, 1).to(tl.float32)
            listed = tl.maximum(units, 1).to(tl.float32) * ratio.to(tl.float32)
            weight = -tl.log(listed / left)
            lowest = tl.maximum(block * SIZE, begin)
            beyond = tl.maximum(block * SIZE, hole_end)
            hits = ends - slot
            for again in tl.range(0, tl.max(hits, 0)):
                key = lowest
                if SIZE > 1:
                    # the same share of the way through the block's keys
                    inside = ((slot + again).to(tl.float64) - since).to(tl.float32) / listed
                    inside = tl.minimum(tl.maximum((inside * left).to(tl.int32), 0), before + behind - 1)
                    key = tl.where(inside < before, lowest + inside, beyond + inside - before)
                hit = again < hits
                tl.store(index_ptr + slot + again, key.to(tl.int64), mask=hit)
                tl.store(weight_ptr + slot + again, weight, mask=hit)
            passed_units += tl.sum(units, 0)


def draw_alike(
    share: Tensor, edges: Tensor, noise: Tensor, results: tuple[Tensor, Tensor, Tensor, Tensor], size: int, even: float,
    rounds: int, least: float,
) -> None:  # fmt: skip
    """Draw keys for each list of queries: see `select.score.stretches`.

    Args:
        share: shares of keys, ``[lists, tiles * many, room]``; not read beyond the known blocks.
        edges: begin, hole begin, hole end and end of the keys that are left, and the number of keys that a tile may
            score, ``[lists, tiles, 5]``.
        noise: where inside a slot its point lies, in [0, 1), ``[lists, tiles * many]``, float64.
        results: for the keys, ascending, and for their log-weights, ``[lists, tiles * many, draws]``; some lists of many
            tiles may follow one another. For the begin and the end of the keys that are left, ``[lists, tiles * many]``.
        size: number of keys in a block.
        even: share of the draws that is spread evenly.
        rounds: rounds of cutting listings to one a key.
        least: sums below this count as 0.
    """
    if results[0].numel():
        launch_draw(share, edges, noise, results, size, even, rounds, least).run()


def launch_draw(
    share: Tensor, edges: Tensor, noise: Tensor, results: tuple[Tensor, Tensor, Tensor, Tensor], size: int, even: float,
    rounds: int, least: float,
) -> Launch:  # fmt: skip
    """Prepare the launch of `draw_alike`, which writes into `results`."""
    index, weight, low, high = results
    return Launch(
        _kernel,
        (share.shape[1], share.shape[0]),
        {
            "share_ptr": share.contiguous(), "edges_ptr": edges, "noise_ptr": noise, "index_ptr": index,
            "weight_ptr": weight, "low_ptr": low, "high_ptr": high, "EDGES": edges.shape[2],
            "room": share.shape[2], "num": index.shape[2], "even": even,
            "least": least, "s_edges": edges.stride(0), "s_noise": noise.stride(0), "s_index": index.stride(0),
            "s_weight": weight.stride(0), "s_low": low.stride(0), "MANY": share.shape[1] // edges.shape[1],
            "SIZE": size, "ROUNDS": rounds, "UNITS": _UNITS,
            "BLOCKS": _BLOCKS, "PLACED": _PLACED if size == 1 else _PLACED_OF_SEVERAL, "num_warps": 4,
        },
    )  # fmt: skip
