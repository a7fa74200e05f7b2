"""Draw keys for lists of alike queries in Triton: the law of `select.score.candidates`, its running sum and its inversion.

All lists of a program are drawn together, so that many loads are on their way at once. Their shares are read seven times,
mostly out of the cache: what is done for each candidate is little, and all else is done for each draw.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

# the sum of a law in fixed point, whose running sums are exact in any order
UNITS = 2**30


@triton.jit
def _rooms(first, count, others, LISTS: tl.constexpr, PLACES: tl.constexpr):
    """Return how many keys are in the places from `first` on, for all lists: one in each candidate's, then all others."""
    place = first + tl.arange(0, PLACES)[None, :]
    last = tl.where(place == count, others[:, None], 0)
    return tl.where(place < count, 1, last).to(tl.float32)


@triton.jit
def _shares(share_at, first, stored, PLACES: tl.constexpr):
    """Load the shares of the candidates from `first` on; `stored`, a multiple of 16, are in memory, zeros behind them."""
    place = first + tl.arange(0, PLACES)[None, :]
    return tl.load(share_at[:, None] + place, mask=place < stored, other=0.0).to(tl.float32)


@triton.jit
def _total(share_at, stored, most, LISTS: tl.constexpr, PLACES: tl.constexpr):
    """Add up the shares of all candidates, none above `most`."""
    total = tl.zeros([LISTS, PLACES], tl.float32)
    for first in tl.range(0, stored, PLACES, num_stages=4):
        total += tl.minimum(_shares(share_at, first, stored, PLACES), most[:, None])
    return tl.sum(total, 1)


@triton.jit
def _units(share, room, most, scale, evenly, unit):
    """Return how often a candidate, or all others, are listed, in fixed point: no key more than once, and each at times."""
    each = tl.minimum(tl.minimum(share, most) * scale + evenly, 1.0)
    units = (each * room * unit + 0.5).to(tl.int32)
    return tl.where(room > 0, tl.maximum(units, 1), 0)


@triton.jit
def _points(units, factor, offset, num, SHIFT: tl.constexpr):
    """Count the points before a running sum of units: in integers, for float32 cannot place one to a part of a draw."""
    return tl.minimum(((units.to(tl.int64) * factor + offset) >> SHIFT).to(tl.int32), num)


@triton.jit
def _other(numbers_ptr, count, rank, asked, begin, hole_begin, hole_end, DIGITS: tl.constexpr):
    """Number the keys that are no candidates: the one before which `rank` others stand, where it is asked for."""
    before_hole = hole_begin - begin
    # candidates before which no more others stand than that
    low, high = tl.zeros(rank.shape, tl.int32), tl.zeros(rank.shape, tl.int32) + count
    # slots of other keys come last
    for _ in tl.range(0, tl.where(tl.max(tl.max(asked.to(tl.int32), 1), 0) > 0, DIGITS, 0)):
        middle = (low + high) // 2
        key = tl.load(numbers_ptr + middle, mask=asked & (low < high), other=0)
        place = tl.where(key < hole_begin, key - begin, key - hole_end + before_hole)
        passed = (low < high) & (place - middle <= rank)
        low, high = tl.where(passed, middle + 1, low), tl.where(passed, high, tl.minimum(high, middle))
    place = rank + low
    return tl.where(place < before_hole, begin + place, place - before_hole + hole_end)


@triton.jit
def draw_lists(
    share_ptr, numbers_ptr, edge_ptr, noise_ptr, index_ptr, weight_ptr, low_ptr, high_ptr, begin_list, lists, count,
    room, num, even, least,
    LISTS: tl.constexpr, ROUNDS: tl.constexpr, ALL: tl.constexpr, SHIFT: tl.constexpr, PLACES: tl.constexpr,
    PLACED: tl.constexpr, SLOTS: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    """Draw for some lists of one tile: from candidates, and from all other keys that are left: see `Candidates`.

    Args:
        share_ptr: shares of candidates, ``[LISTS, room]``, and zeros up to a multiple of 16.
        numbers_ptr: numbers of the candidates, ascending, all of them left.
        edge_ptr: begin, hole begin, hole end and end of what is left.
        noise_ptr: where inside a slot each list's points lie, in [0, 1), float64.
        index_ptr: for the keys, ``[lists, num]``: ascending, but that all other keys follow candidates.
        weight_ptr: for their log-weights, float32.
        low_ptr: for the begin of the keys that are left, of each list.
        high_ptr: for their end.
        begin_list: the first of these lists.
        lists: number of lists.
        count: number of candidates.
        room: places of a list in `share_ptr`.
        num: draws of a list.
        even: share of the draws that is spread evenly.
        least: sums below this count as 0.
        LISTS: lists that are drawn together.
        ROUNDS: rounds of cutting listings to one a key.
        ALL: the sum of a law in fixed point.
        SHIFT: binary digits of a point behind the comma.
        PLACES: candidates of each list read at once.
        PLACED: candidates of each list whose draws are placed at once.
        SLOTS: slots of each list that are written at once.
        DIGITS: candidates are fewer than 2 to the power of this number.
    """
    number = tl.arange(0, LISTS)
    row, there = (begin_list + number).to(tl.int64), number < lists
    begin, end = tl.load(edge_ptr), tl.load(edge_ptr + 3)
    tl.store(low_ptr + row, begin, mask=there)
    tl.store(high_ptr + row, end, mask=there)
    begin, end = begin.to(tl.int32), end.to(tl.int32)
    hole_begin, hole_end = tl.load(edge_ptr + 1).to(tl.int32), tl.load(edge_ptr + 2).to(tl.int32)
    # a list that is not there has no keys
    left = tl.where(there, hole_begin - begin + end - hole_end, 0)
    few = left <= num
    others = tl.maximum(left - count, 0)
    share_at = share_ptr + number * room
    stored = tl.cdiv(count, 16) * 16
    weighted = (1.0 - even) * num
    most = tl.full([LISTS], float("inf"), tl.float32)
    total = _total(share_at, stored, most, LISTS, PLACES)
    for _ in tl.range(0, ROUNDS):
        most = total / weighted
        total = _total(share_at, stored, most, LISTS, PLACES)
    scale = weighted / tl.maximum(total, least)
    # where nothing was scored this is all there is, and all draws are even
    evenly = even * num / tl.maximum(left, 1).to(tl.float32)
    unit = ALL / num
    in_all = tl.zeros([LISTS, PLACES], tl.int32)
    for first in tl.range(0, count + 1, PLACES, num_stages=4):
        share = _shares(share_at, first, stored, PLACES)
        rooms = _rooms(first, count, others, LISTS, PLACES)
        in_all += _units(share, rooms, most[:, None], scale[:, None], evenly[:, None], unit)
    in_all = tl.maximum(tl.sum(in_all, 1), 1)
    noise = tl.load(noise_ptr + row, mask=there, other=0.0)
    # rounded up, so that the last point lies before the end
    factor = ((tl.full([LISTS], 1, tl.int64) * num << SHIFT) // in_all + 1)[:, None]
    offset = ((1 << SHIFT) - 1 - (noise * (1 << SHIFT)).to(tl.int64))[:, None]
    index_at, weight_at = (index_ptr + row * num)[:, None], (weight_ptr + row * num)[:, None]
    drawn = (there & (few == 0))[:, None]
    passed = tl.zeros([LISTS], tl.int32)
    share_ahead = _shares(share_at, 0, stored, PLACED)
    # a slot is given its candidate, in the upper half, and the units before that
    for first in tl.range(0, count + 1, PLACED):
        place = first + tl.arange(0, PLACED)[None, :]
        share, share_ahead = share_ahead, _shares(share_at, first + PLACED, stored, PLACED)
        rooms = _rooms(first, count, others, LISTS, PLACED)
        units = _units(share, rooms, most[:, None], scale[:, None], evenly[:, None], unit)
        until = passed[:, None] + tl.cumsum(units, 1)
        slot = _points(until - units, factor, offset, num, SHIFT)
        hits = tl.where(drawn, _points(until, factor, offset, num, SHIFT) - slot, 0)
        for again in tl.range(0, tl.max(tl.max(hits, 1), 0)):
            given = (place.to(tl.int64) << 32) | (until - units).to(tl.int64)
            tl.store(index_at + slot + again, given, mask=again < hits)
        passed += tl.sum(units, 1)
    # read by other threads
    tl.debug_barrier()
    ratio = num / in_all.to(tl.float64)[:, None]
    left, few, others = left[:, None], few[:, None], others[:, None]
    for first in tl.range(0, num, SLOTS):
        slot = first + tl.arange(0, SLOTS)[None, :]
        inside = there[:, None] & (slot < num)
        given = tl.load(index_at + slot, mask=inside & drawn, other=0)
        place, since = (given >> 32).to(tl.int32), (given & 0x7FFFFFFF).to(tl.float64) * ratio
        one_of = inside & drawn & (place < count)
        share = tl.load(share_at[:, None] + place, mask=one_of, other=0.0).to(tl.float32)
        keys_of = tl.where(place == count, others, 1)
        rooms = keys_of.to(tl.float32)
        units = _units(share, rooms, most[:, None], scale[:, None], evenly[:, None], unit)
        listed = tl.maximum(units, 1).to(tl.float32) * ratio.to(tl.float32)
        weight = -tl.log(listed / tl.maximum(rooms, 1.0))
        # the same share of the way through the other keys
        way = (slot.to(tl.float64) + noise[:, None] - since).to(tl.float32) / listed
        far = tl.minimum(tl.maximum((way * rooms).to(tl.int32), 0), tl.maximum(keys_of - 1, 0))
        one = tl.load(numbers_ptr + place, mask=one_of, other=0)
        asked = inside & drawn & (place == count)
        key = tl.where(asked, _other(numbers_ptr, count, far, asked, begin, hole_begin, hole_end, DIGITS), one)
        # all that is left is listed where it is few
        listed_key = begin + tl.minimum(slot, tl.maximum(left - 1, 0))
        listed_key += tl.where(listed_key >= hole_begin, hole_end - hole_begin, 0)
        key = tl.where(few, listed_key, key)
        weight = tl.where(few, tl.where(slot < left, 0.0, -float("inf")), weight)
        tl.store(index_at + slot, key.to(tl.int64), mask=inside)
        tl.store(weight_at + slot, weight, mask=inside)
