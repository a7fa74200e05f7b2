"""The fast list kernel in Triton, forward: one loop over ranges of keys, one over a flat list, and nothing else in them.

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

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch, StoredRows, by_head, precision_of, store_of
from hyperattention.kernels.list.flat_form import FlatForm, FlatLists
from hyperattention.kernels.list.triton_flatten import flatten
from hyperattention.kernels.list.triton_forward import Shape, capability_of, shape_of, widest
from hyperattention.kernels.list.triton_slots import stored_at

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
def _flat_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, key_row_ptr, limit_ptr, header_ptr, range_weight_ptr, index_ptr, weight_ptr,
    scale, tiles, rows, size, kp, vp,
    KS: tl.constexpr, VS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    RANGED: tl.constexpr, TESTED: tl.constexpr, CAPACITY: tl.constexpr, CARRY: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
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
    header_ptr += tile * HEADER
    slot = tl.arange(0, BLOCK)

    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    if RANGED:
        begin, length = tl.load(header_ptr), tl.load(header_ptr + 1)
        jump, count = tl.load(header_ptr + 2) - length, tl.load(header_ptr + 3)
        special, causal_from = tl.minimum(tl.load(header_ptr + 4), count), tl.load(header_ptr + 5)
        first_weight, second_weight = tl.load(range_weight_ptr + tile * 2), tl.load(range_weight_ptr + tile * 2 + 1)
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
    if CAPACITY:
        listed, num_tested = tl.load(header_ptr + 6), tl.load(header_ptr + 7)
        index_at, weight_at = index_ptr + tile * CAPACITY, weight_ptr + tile * CAPACITY
        begin = num_tested * 0
        if TESTED:
            # a block or two of a few tiles: the keys of a list that not every row of its tile sees
            begin = tl.cdiv(num_tested, BLOCK) * BLOCK
            for at in tl.range(0, begin, HALF):
                part = at + tl.arange(0, HALF)
                index = tl.load(index_at + part)
                score = _products(q, k_base, index, in_key, KS, HEAD_DIM == WIDTH, PRECISION) * scale
                score += tl.load(weight_at + part)[None, :]
                tested = tl.where(part < num_tested, index, -1)
                score = tl.where(tested[None, :] < limit[:, None], score, -float("inf"))
                top, total, mean = _accumulate(
                    score, v_base, index, in_value, top, total, mean, VS, VALUE_DIM == VALUE_WIDTH, PRECISION
                )
        last = tl.maximum(tl.cdiv(listed, BLOCK) - 1, 0) * BLOCK
        # the numbers of a block are here before the block before it is read
        index = tl.load(index_at + tl.minimum(begin, last) + slot)
        weight = tl.load(weight_at + tl.minimum(begin, last) + slot)
        for at in tl.range(begin, listed, BLOCK):
            following = tl.minimum(at + BLOCK, last)
            next_index = tl.load(index_at + following + slot)
            next_weight = weight
            if CARRY:
                next_weight = tl.load(weight_at + following + slot)
            score = _products(q, k_base, index, in_key, KS, HEAD_DIM == WIDTH, PRECISION) * scale
            if not CARRY:
                weight = tl.load(weight_at + at + slot)
            score += weight[None, :]
            top, total, mean = _accumulate(
                score, v_base, index, in_value, top, total, mean, VS, VALUE_DIM == VALUE_WIDTH, PRECISION
            )
            index, weight = next_index, next_weight

    # a total that is not a number stays so
    empty = total == 0
    mean = tl.where(empty[:, None], 0.0, mean / tl.where(empty, 1.0, total)[:, None])
    lse = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN_2)
    # rows are numbered again, by what the compiler cannot know to be 0: kept, their numbers would take 50 registers from the
    # loops, and spill
    row = first_row + tl.minimum(tl.load(header_ptr + 3, volatile=True), 0) + tl.arange(0, ROWS)
    inside = row < rows
    stored = stored_at(tile, row, tiles, rows, size)
    tl.store(lse_ptr + stored, lse, mask=inside)
    out_at = out_ptr + stored[:, None] * VALUE_DIM + value_columns[None, :]
    tl.store(out_at, mean.to(out_ptr.dtype.element_ty), mask=inside[:, None] & in_value)


def flat_forward(q: Tensor, k: Tensor, v: Tensor, form: FlatForm, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from every tile to the keys on its list: `list_torch.forward` on a GPU, in two launches.

    Args:
        q: queries by tile, ``[lists, tiles, group, size, head_dim]``.
        k: keys, ``[key_rows, keys, head_dim]``.
        v: values, laid out as the keys.
        form: the selection, laid out.
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
    launch_flat(q, *stores, (out, lse), form, flatten(form), scale, cut, carry=carries(cut)).run()
    return out.transpose(1, 2), lse.transpose(1, 2)


def launch_flat(
    q: Tensor,
    k: StoredRows,
    v: StoredRows,
    results: tuple[Tensor, Tensor],
    form: FlatForm,
    flat: FlatLists,
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
        form: the selection, laid out.
        flat: the selection, as the kernel reads it.
        scale: factor of the scores.
        cut: how a program is cut.
        carry: whether log-weights are fetched one block ahead.

    Returns:
        the launch.
    """
    num_lists, tiles, group, size, head_dim = q.shape
    rows, value_dim = group * size, v.data.shape[-1]
    width, value_width = (max(16, triton.next_power_of_2(x)) for x in (head_dim, value_dim))
    return Launch(
        _flat_kernel,
        (num_lists * tiles * triton.cdiv(rows, cut.rows),),
        {
            "q_ptr": by_head(q), "k_ptr": k.data, "v_ptr": v.data, "out_ptr": results[0], "lse_ptr": results[1],
            "key_row_ptr": form.lists.key_row.contiguous(), "limit_ptr": form.lists.row_limit.contiguous(),
            "header_ptr": flat.header, "range_weight_ptr": flat.range_weight, "index_ptr": flat.index,
            "weight_ptr": flat.log_weight, "scale": scale / math.log(2), "tiles": tiles, "rows": rows, "size": size,
            "kp": k.strides[0], "vp": v.strides[0], "KS": k.strides[2], "VS": v.strides[2],
            "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "RANGED": flat.ranges, "TESTED": flat.tested,
            "CAPACITY": form.capacity, "CARRY": carry, "PRECISION": precision_of(q),
            "ROWS": cut.rows, "BLOCK": cut.block, "HALF": max(16, cut.block // 2),
            "WIDTH": width, "VALUE_WIDTH": value_width,
            "num_warps": cut.warps, "num_stages": cut.stages,
        },
    )  # fmt: skip
