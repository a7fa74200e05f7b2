"""The fast list kernel in Triton, forward: one loop over ranges of keys, one over a list, and nothing else in them.

A selection of several lists is laid out as one first (`triton_flatten`); a single list is read as it lies.

What makes it fast, and what the general kernel (`triton_forward`) cannot do with its groups:

- keys and values are fetched asynchronously while the block before them is multiplied. A compiler does that only where their
  addresses are known: numbers of a range are computed, those of a list are fetched one block ahead and carried in registers;
- pairs are tested in the few blocks where a test may fail, and exponentials are powers of 2, whose factor log2(e) is part of
  the scale and of the log-weights;
- strides are constants, so that 16 bytes are copied at a time.

`list_torch` is the specification; operands of products stay in the dtype of the input, sums are float32.
"""
# what a kernel may write is Triton's language, which its own stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch, StoredRows, by_head, groups_of, precision_of, store_of
from hyperattention.kernels.list.flat_form import BLOCK, FlatForm, FlatLists
from hyperattention.kernels.list.triton_flatten import flatten
from hyperattention.kernels.list.triton_forward import Shape, capability_of, shape_of, widest
from hyperattention.kernels.list.triton_slots import LOG2_E, NEVER, ranges_of, slots_of, stored_at

# groups of a selection as arguments, and slots of one that are looked at at once
_GROUPS = "firsts", "weights", "lows", "highs", "holes", "slots", "RUNS", "HOLED", "CAUSAL"
_CHUNK = 1024
HEADER = tl.constexpr(8)
LN_2 = tl.constexpr(0.6931471805599453)


def flat_shape_of(rows: int, width: int, itemsize: int, capability: int) -> Shape:
    """Choose how to cut a program; two fit a multiprocessor of an H100, so that one multiplies while another exponentiates.

    Args:
        rows: rows of a tile.
        width: numbers of the widest key or value, rounded up to a power of two.
        itemsize: bytes of each.
        capability: major number of the device's; from 9 on products read shared memory, and need fewer registers.

    Returns:
        the shape. At 128 numbers of two bytes: measured on an H100 under Triton 3.6. There (64, 128, 4, 2) and
        (128, 128, 8, 2) crash.
    """
    if itemsize == 4 or width > 128 or capability < 9:
        return shape_of(rows, width, itemsize, capability)
    most = max(16, triton.next_power_of_2(min(rows, 128)))
    return Shape(most, 64, 4, 3 if most <= 64 or width <= 64 else 2)


def carries(cut: Shape) -> bool:
    """Return whether log-weights are fetched a block ahead, which takes registers: where a thread has some left."""
    return cut.rows <= 16 * cut.warps


@triton.jit
def _products(q, k_base, index, in_key, KS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr):
    """Fetch keys, and multiply them with queries."""
    at = k_base + index.to(tl.int64)[:, None] * KS
    k = tl.load(at) if WHOLE else tl.load(at, mask=in_key, other=0.0)
    return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def _accumulate(
    score, v_base, index, in_value, top, total, mean, VS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Go on with the running softmax by a block of scores and their values."""
    new_top = tl.maximum(top, tl.max(score, 1))
    # any finite number serves where nothing was seen: -inf minus -inf would be NaN
    centre = tl.where(new_top == -float("inf"), 0.0, new_top)
    weight = tl.exp2(score - centre[:, None])
    shrink = tl.exp2(top - centre)
    at = v_base + index.to(tl.int64)[:, None] * VS
    v = tl.load(at) if WHOLE else tl.load(at, mask=in_value, other=0.0)
    mean = tl.dot(weight.to(v.dtype), v, mean * shrink[:, None], input_precision=PRECISION)
    return new_top, total * shrink + tl.sum(weight, 1), mean


@triton.jit
def _named(group, tile, num_tiles, RUN: tl.constexpr, HOLED: tl.constexpr, BLOCK: tl.constexpr):
    """Tell up to which slot a group names keys of a tile, how many slots do, and the last of these keys."""
    first, weight, low, high, hole, slots = group
    until, count, last = tile.to(tl.int32) * 0, tile.to(tl.int32) * 0, tile.to(tl.int32) * 0
    for at in tl.range(0, slots, BLOCK):
        index, bias = slots_of(first, weight, low, high, hole, tile, num_tiles, at, slots, RUN, HOLED, BLOCK)
        live = bias != -float("inf")
        until = tl.maximum(until, tl.max(tl.where(live, at + tl.arange(0, BLOCK) + 1, 0), 0))
        count += tl.sum(live.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(live, index, 0), 0))
    return until, count, last


@triton.jit
def _some_of(group, tile, num_tiles, at, last, RUN: tl.constexpr, HOLED: tl.constexpr, BLOCK: tl.constexpr):
    """Fetch a block of a group as it lies; slots that name no key are given the key `last`."""
    first, weight, low, high, hole, slots = group
    index, bias = slots_of(first, weight, low, high, hole, tile, num_tiles, at, slots, RUN, HOLED, BLOCK)
    return tl.where(bias == -float("inf"), last, index), bias * LOG2_E


@triton.jit
def _block_of(index_at, weight_at, at, LAID_OUT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """Fetch a block of a flat list, or of a group whose slots all name keys."""
    slot = at + tl.arange(0, BLOCK)
    if LAID_OUT:
        index, weight = tl.load(index_at + slot), tl.load(weight_at + slot)
    elif RUN == 0:
        index, weight = tl.load(index_at).to(tl.int32) + slot, tl.load(weight_at + slot * 0) * LOG2_E
    else:
        index = tl.load(index_at + slot // RUN).to(tl.int32) + slot % RUN
        weight = tl.load(weight_at + slot // RUN) * LOG2_E
    return index, weight


@triton.jit
def _flat_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, key_row_ptr, limit_ptr, header_ptr, range_weight_ptr,
    index_ptr, weight_ptr, firsts, weights, lows, highs, holes, slots,
    scale, tiles, num_tiles, rows, size, kp, vp,
    KS: tl.constexpr, VS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    RUNS: tl.constexpr, HOLED: tl.constexpr, CAUSAL: tl.constexpr, LAID_OUT: tl.constexpr, RANGES: tl.constexpr,
    TESTED: tl.constexpr, CAPACITY: tl.constexpr, CARRY: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    slabs = tl.cdiv(rows, ROWS)
    tile = (tl.program_id(0) // slabs).to(tl.int64)
    first_row = (tl.program_id(0) % slabs) * ROWS
    row = first_row + tl.arange(0, ROWS)
    inside = row < rows
    key_row = tl.load(key_row_ptr + tile // tiles)
    columns, value_columns = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    in_key, in_value = columns[None, :] < HEAD_DIM, value_columns[None, :] < VALUE_DIM
    stored = stored_at(tile, row, tiles, rows, size)
    q = tl.load(q_ptr + stored[:, None] * HEAD_DIM + columns[None, :], mask=inside[:, None] & in_key, other=0.0)
    limit = tl.zeros([ROWS], tl.int32)
    if TESTED:
        limit = tl.load(limit_ptr + tile * rows + row, mask=inside, other=0).to(tl.int32)
    k_base, v_base = k_ptr + key_row * kp + columns[None, :], v_ptr + key_row * vp + value_columns[None, :]

    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    if RANGES:
        if LAID_OUT:
            header_at, range_at = header_ptr + tile * HEADER, range_weight_ptr + tile * 2
            begin, length, begin_2 = tl.load(header_at), tl.load(header_at + 1), tl.load(header_at + 2)
            count, special, causal_from = tl.load(header_at + 3), tl.load(header_at + 4), tl.load(header_at + 5)
            first_weight, second_weight = tl.load(range_at), tl.load(range_at + 1)
        else:
            least = tl.min(tl.where(inside, limit, NEVER), 0) if TESTED else tile.to(tl.int32) * 0 + NEVER
            begin, length, begin_2, count, special, causal_from, first_weight, second_weight = ranges_of(
                firsts, weights, lows, highs, slots, tile, least, CAUSAL, RANGES
            )
        jump, special = begin_2 - length, tl.minimum(special, count)
        for phase in tl.static_range(2):
            # whole blocks of one weight that every row sees, then those that need a closer look
            edge = special // BLOCK * BLOCK
            for at in tl.range(0 if phase == 0 else edge, edge if phase == 0 else count, BLOCK if phase == 0 else HALF):
                place = at + tl.arange(0, BLOCK if phase == 0 else HALF)
                if phase == 1:
                    # places beyond the last name the last key, with a weight of -inf: what is read is always a listed key
                    place = tl.minimum(place, count - 1)
                index = place + tl.where(place < length, begin, jump)
                score = _products(q, k_base, index, in_key, KS, HEAD_DIM == WIDTH, PRECISION) * scale
                if phase == 0:
                    score += first_weight
                else:
                    weight = tl.where(place < length, first_weight, second_weight)
                    score += tl.where(at + tl.arange(0, HALF) < count, weight, -float("inf"))[None, :]
                    if TESTED:
                        tested = tl.where(place < causal_from, -1, index)
                        score = tl.where(tested[None, :] < limit[:, None], score, -float("inf"))
                top, total, mean = _accumulate(
                    score, v_base, index, in_value, top, total, mean, VS, VALUE_DIM == VALUE_WIDTH, PRECISION
                )
    if LAID_OUT or len(RUNS) > RANGES:
        RUN: tl.constexpr = 1 if LAID_OUT else RUNS[RANGES]
        # slots from `look` to `until` are tested; those from `begin` to `end` all name keys that every row sees
        if LAID_OUT:
            listed, num_tested = tl.load(header_ptr + tile * HEADER + 6), tl.load(header_ptr + tile * HEADER + 7)
            index_at, weight_at = index_ptr + tile * CAPACITY, weight_ptr + tile * CAPACITY
            begin, end = tl.cdiv(num_tested, BLOCK) * BLOCK, listed
            look, until = 0, begin
        else:
            group = firsts[RANGES], weights[RANGES], lows[RANGES], highs[RANGES], holes[RANGES], slots[RANGES]
            until, count, last_key = _named(group, tile, num_tiles, RUN, HOLED[RANGES], CHUNK)
            runs = 1 if RUN == 0 else slots[RANGES] // RUN
            index_at, weight_at = firsts[RANGES] + tile * runs, weights[RANGES] + tile * runs
            look = until * 0 if CAUSAL[RANGES] else tl.where(count == until, until // BLOCK * BLOCK, 0)
            begin, end = until * 0, look
        if TESTED or not LAID_OUT:
            # a block or two of a few tiles, or the last block of a list that ends within it
            for at in tl.range(look, until, HALF):
                tested = at + tl.arange(0, HALF)
                if LAID_OUT:
                    index, weight = _block_of(index_at, weight_at, at, LAID_OUT, RUN, HALF)
                    tested = tl.where(tested < num_tested, index, -1)
                else:
                    index, weight = _some_of(group, tile, num_tiles, at, last_key, RUN, HOLED[RANGES], HALF)
                    tested = index if CAUSAL[RANGES] else tested * 0 - 1
                score = _products(q, k_base, index, in_key, KS, HEAD_DIM == WIDTH, PRECISION) * scale
                score += weight[None, :]
                if TESTED:
                    score = tl.where(tested[None, :] < limit[:, None], score, -float("inf"))
                top, total, mean = _accumulate(
                    score, v_base, index, in_value, top, total, mean, VS, VALUE_DIM == VALUE_WIDTH, PRECISION
                )
        if LAID_OUT or not CAUSAL[RANGES]:
            last = tl.maximum(tl.cdiv(end, BLOCK) - 1, 0) * BLOCK
            # the numbers of a block are here before the block before it is read
            if LAID_OUT:
                index, weight = _block_of(index_at, weight_at, tl.minimum(begin, last), LAID_OUT, RUN, BLOCK)
            else:
                # a group may have fewer slots than a block
                index, weight = _some_of(group, tile, num_tiles, 0, last_key, RUN, HOLED[RANGES], BLOCK)
            for at in tl.range(begin, end, BLOCK):
                following = tl.minimum(at + BLOCK, last)
                next_index, next_weight = _block_of(index_at, weight_at, following, LAID_OUT, RUN, BLOCK)
                score = _products(q, k_base, index, in_key, KS, HEAD_DIM == WIDTH, PRECISION) * scale
                if not CARRY:
                    _, weight = _block_of(index_at, weight_at, at, LAID_OUT, RUN, BLOCK)
                score += weight[None, :]
                top, total, mean = _accumulate(
                    score, v_base, index, in_value, top, total, mean, VS, VALUE_DIM == VALUE_WIDTH, PRECISION
                )
                index = next_index
                if CARRY:
                    weight = next_weight

    # a total that is not a number stays so
    empty = total == 0
    mean = tl.where(empty[:, None], 0.0, mean / tl.where(empty, 1.0, total)[:, None])
    lse = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN_2)
    # rows are numbered again, by what the compiler cannot know to be 0: kept, their numbers would take 50 registers from the
    # loops, and spill
    row = first_row + tl.minimum(tl.load(key_row_ptr, volatile=True), 0).to(tl.int32) + tl.arange(0, ROWS)
    inside = row < rows
    stored = stored_at(tile, row, tiles, rows, size)
    tl.store(lse_ptr + stored, lse, mask=inside)
    out_at = out_ptr + stored[:, None] * VALUE_DIM + value_columns[None, :]
    tl.store(out_at, mean.to(out_ptr.dtype.element_ty), mask=inside[:, None] & in_value)


def flat_forward(q: Tensor, k: Tensor, v: Tensor, form: FlatForm, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from every tile to the keys on its list: `list_torch.forward` on a GPU, in one launch, or two.

    Args:
        q: queries by tile, ``[lists, tiles, group, size, head_dim]``.
        k: keys, ``[key_rows, keys, head_dim]``.
        v: values, laid out as the keys.
        form: the selection.
        scale: factor of the scores.

    Returns:
        out ``[lists, tiles, group, size, value_dim]`` in the dtype of `q`, and lse, without its last axis, in float32; both
        lie head after head.
    """
    num_lists, tiles, group, size = q.shape[:4]
    lse = q.new_empty((num_lists, group, tiles, size), dtype=torch.float32)
    out = q.new_empty((*lse.shape, v.shape[-1]))
    cut = flat_shape_of(group * size, widest(q, v), q.element_size(), capability_of(q))
    stores = store_of(k, None), store_of(v, None)
    flat = flatten(form) if form.to_lay_out else None
    launch_flat(q, *stores, (out, lse), form, flat, scale, cut, carry=carries(cut)).run()
    return out.transpose(1, 2), lse.transpose(1, 2)


def launch_flat(
    q: Tensor,
    k: StoredRows,
    v: StoredRows,
    results: tuple[Tensor, Tensor],
    form: FlatForm,
    flat: FlatLists | None,
    scale: float,
    cut: Shape,
    *,
    carry: bool,
) -> Launch:
    """Prepare the launch, so that it can be run, or compiled for another machine.

    Args:
        q: queries by tile.
        k: keys.
        v: values.
        results: out ``[lists, group, tiles, size, value_dim]`` and lse without its last axis, to be written.
        form: the selection.
        flat: the selection, laid out; None for one that is read as it lies.
        scale: factor of the scores.
        cut: how a program is cut.
        carry: whether log-weights are fetched one block ahead.

    Returns:
        the launch.
    """
    num_lists, tiles, group, size, head_dim = q.shape
    rows, value_dim, limit = group * size, v.data.shape[-1], form.lists.row_limit.contiguous()
    width, value_width = (max(16, triton.next_power_of_2(x)) for x in (head_dim, value_dim))
    # for what is not read the limit is passed
    laid_out = (limit,) * 4 if flat is None else (flat.header, flat.range_weight, flat.index, flat.log_weight)
    groups = groups_of(form.lists, BLOCK)
    return Launch(
        _flat_kernel,
        (num_lists * tiles * triton.cdiv(rows, cut.rows),),
        {
            "q_ptr": by_head(q), "k_ptr": k.data, "v_ptr": v.data, "out_ptr": results[0], "lse_ptr": results[1],
            "key_row_ptr": form.lists.key_row.contiguous(), "limit_ptr": limit,
            "header_ptr": laid_out[0], "range_weight_ptr": laid_out[1], "index_ptr": laid_out[2], "weight_ptr": laid_out[3],
            **{name: groups[name] if flat is None else () for name in _GROUPS},
            "scale": scale / math.log(2), "tiles": tiles, "num_tiles": num_lists * tiles, "rows": rows, "size": size,
            "kp": k.strides[0], "vp": v.strides[0], "KS": k.strides[2], "VS": v.strides[2],
            "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "LAID_OUT": flat is not None, "RANGES": form.num_ranges,
            "TESTED": any(form.lists.causal),
            "CAPACITY": 0 if flat is None else form.capacity, "CARRY": carry, "PRECISION": precision_of(q),
            "ROWS": cut.rows, "BLOCK": cut.block, "HALF": max(16, cut.block // 2), "CHUNK": _CHUNK,
            "WIDTH": width, "VALUE_WIDTH": value_width,
            "num_warps": cut.warps, "num_stages": cut.stages,
        },
    )  # fmt: skip
