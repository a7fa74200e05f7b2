"""The list kernel in Triton, backward: one launch for the queries, and one for the keys and values.

With P the weights of a row, and D = dout . out - dlse:

    dv += P^T dout,   dS = P (dout v^T - D),   dq = dS k,   dk += dS^T q

(Dao et al., 2022, arXiv:2205.14135, alg. 4, and the gradient of lse). Weights are computed again from lse. Many tiles list
the same key, so dk and dv are summed by atomic additions in float32, whose order and last bits vary from run to run. If
torch is set to deterministic algorithms, `reference.backward` runs instead.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch, by_head, groups_of, labels_in_a_row, precision_of, row_tests_of, store_of
from hyperattention.kernels.list.reference import Lists
from hyperattention.kernels.list.triton_forward import Shape, capability_of, widest
from hyperattention.kernels.list.triton_slots import allowed, blocks_of, labels_of, slots_of, stored_at

# numbers of a gradient that a program zeroes at once
_ZEROED = 1024


def queries_shape_of(rows: int, width: int, itemsize: int, capability: int) -> Shape:
    """Choose the shape of a program for the gradient of the queries, which holds dout in addition to the forward's data.

    Args:
        rows: rows of a tile.
        width: numbers of the widest key or value, rounded up to a power of two.
        itemsize: bytes of each.
        capability: major number of the device's.

    Returns:
        the shape.
    """
    most = max(16, triton.next_power_of_2(min(rows, 64)))
    if itemsize == 4:
        return Shape(min(most, 32), 32 if width <= 128 else 16, 4, 1)
    if width > 128:
        return Shape(min(most, 32), 32, 4, 1)
    return Shape(most, 64 if width <= 64 and capability >= 9 else 32, 4, 2)


def keys_shape_of(rows: int, width: int, itemsize: int, capability: int) -> Shape:
    """Choose the shape of a program for the gradient of keys and values, which holds a block of both and their gradients.

    Args:
        rows: rows of a tile.
        width: numbers of the widest key or value, rounded up to a power of two.
        itemsize: bytes of each.
        capability: major number of the device's.

    Returns:
        the shape.
    """
    most = max(16, triton.next_power_of_2(min(rows, 64)))
    if itemsize == 4:
        return Shape(min(most, 32), 32 if width <= 128 else 16, 4, 1)
    if width > 64:
        return Shape(min(most, 32), 64 if width <= 128 else 32, 8, 1)
    return Shape(most, 64 if capability >= 9 else 32, 4, 2)


@triton.jit
def _zero(x_ptr, numbers, ZEROED: tl.constexpr):
    """Zero this program's share of a tensor."""
    share = tl.cdiv(numbers, tl.num_programs(0))
    first = tl.program_id(0).to(tl.int64) * share
    for done in tl.range(0, share, ZEROED):
        at = done + tl.arange(0, ZEROED)
        tl.store(x_ptr + first + at, tl.zeros([ZEROED], tl.float32), mask=(at < share) & (first + at < numbers))


@triton.jit
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, grad_out_ptr, grad_lse_ptr, dq_ptr, centre_ptr, dk_ptr, dv_ptr,
    firsts, weights, lows, highs, holes, slots,
    key_row_ptr, limit_ptr, row_label_ptr, key_label_ptr, gap_low_ptr, gap_high_ptr,
    scale, num_tiles, tiles, rows, size, keys, head_dim, value_dim, kp, ks, vp, vs, key_numbers, value_numbers,
    RUNS: tl.constexpr, BLOCKS: tl.constexpr, HOLED: tl.constexpr, CAUSAL: tl.constexpr, LABELLED: tl.constexpr,
    GAP: tl.constexpr, LABELS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, ZEROED: tl.constexpr,
):  # fmt: skip
    # what the launch for the keys adds to
    _zero(dk_ptr, key_numbers, ZEROED)
    _zero(dv_ptr, value_numbers, ZEROED)
    slabs = tl.cdiv(rows, ROWS)
    tile = (tl.program_id(0) // slabs).to(tl.int64)
    row = (tl.program_id(0) % slabs) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    at = tile * rows + row
    list_number = tile // tiles
    key_row = tl.load(key_row_ptr + list_number)
    columns, value_columns = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    in_key, in_value = columns[None, :] < head_dim, value_columns[None, :] < value_dim
    stored = stored_at(tile, row, tiles, rows, size)
    q = tl.load(q_ptr + stored[:, None] * head_dim + columns[None, :], mask=inside[:, None] & in_key, other=0.0)
    of_values = stored[:, None] * value_dim + value_columns[None, :]
    out = tl.load(out_ptr + of_values, mask=inside[:, None] & in_value, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + of_values, mask=inside[:, None] & in_value, other=0.0)
    centre = tl.sum(out * grad_out.to(tl.float32), 1) - tl.load(grad_lse_ptr + stored, mask=inside, other=0.0)
    tl.store(centre_ptr + stored, centre, mask=inside)
    lse = tl.load(lse_ptr + stored, mask=inside, other=-float("inf"))
    # a row that sees no key has weights of zero for any lse
    lse = tl.where(lse == -float("inf"), 0.0, lse)
    limit = tl.load(limit_ptr + at, mask=inside, other=0)
    row_label, gap_low, gap_high = limit, limit, limit
    if LABELS:
        row_label = tl.load(row_label_ptr + at, mask=inside, other=0)
    if GAP:
        gap_low = tl.load(gap_low_ptr + at, mask=inside, other=0)
        gap_high = tl.load(gap_high_ptr + at, mask=inside, other=0)
    k_base, v_base = k_ptr + key_row * kp + columns[None, :], v_ptr + key_row * vp + value_columns[None, :]
    labels = key_label_ptr + list_number * keys

    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    for g in tl.static_range(len(RUNS)):
        begin, end = blocks_of(
            firsts[g], lows[g], highs[g], tile, slots[g], 0, tl.cdiv(slots[g], BLOCKS[g]), RUNS[g], BLOCKS[g]
        )
        for b in tl.range(begin, end):
            index, bias = slots_of(
                firsts[g], weights[g], lows[g], highs[g], holes[g], tile, num_tiles, b * BLOCKS[g], slots[g],
                RUNS[g], HOLED[g], BLOCKS[g],
            )  # fmt: skip
            live = bias > -float("inf")
            place = index.to(tl.int64)[:, None]
            k = tl.load(k_base + place * ks, mask=live[:, None] & in_key, other=0.0)
            v = tl.load(v_base + place * vs, mask=live[:, None] & in_value, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :]
            label = labels_of(labels, index, live, LABELLED[g] and LABELS)
            score = allowed(
                score, index[None, :], limit[:, None], row_label[:, None], label[None, :],
                gap_low[:, None], gap_high[:, None], CAUSAL[g], LABELLED[g] and LABELS, GAP,
            )  # fmt: skip
            weight = tl.exp(score - lse[:, None])
            slope = weight * (tl.dot(grad_out, tl.trans(v), input_precision=PRECISION) - centre[:, None])
            dq = tl.dot(slope.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_at = dq_ptr + stored[:, None] * head_dim + columns[None, :]
    tl.store(dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None] & in_key)


@triton.jit
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, grad_out_ptr, centre_ptr, dk_ptr, dv_ptr,
    firsts, weights, lows, highs, holes, slots,
    key_row_ptr, limit_ptr, row_label_ptr, key_label_ptr, gap_low_ptr, gap_high_ptr,
    scale, num_tiles, tiles, rows, size, keys, rows_of_keys, head_dim, value_dim, kp, ks, vp, vs,
    RUNS: tl.constexpr, HOLED: tl.constexpr, CAUSAL: tl.constexpr, LABELLED: tl.constexpr, BLOCK: tl.constexpr,
    GAP: tl.constexpr, LABELS: tl.constexpr, ANY_CAUSAL: tl.constexpr, ANY_LABELLED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = 0
    for g in tl.static_range(len(RUNS)):
        blocks += tl.cdiv(slots[g], BLOCK)
    tile = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    list_number = tile // tiles
    key_row = tl.load(key_row_ptr + list_number)
    # the group of this block; all tests of pairs are made for every group, and cannot fail where a group has none
    index, bias = tl.zeros([BLOCK], tl.int32), tl.full([BLOCK], -float("inf"), tl.float32)
    causal, labelled = block < 0, block < 0
    passed = 0
    for g in tl.static_range(len(RUNS)):
        count = tl.cdiv(slots[g], BLOCK)
        if (block >= passed) & (block < passed + count):
            index, bias = slots_of(
                firsts[g], weights[g], lows[g], highs[g], holes[g], tile, num_tiles, (block - passed) * BLOCK, slots[g],
                RUNS[g], HOLED[g], BLOCK,
            )  # fmt: skip
            causal = block >= 0 if CAUSAL[g] else block < 0
            labelled = block >= 0 if LABELLED[g] else block < 0
        passed += count
    live = bias > -float("inf")
    label = labels_of(key_label_ptr + list_number * keys, index, live, ANY_LABELLED and LABELS)
    place = index.to(tl.int64)[:, None]
    columns, value_columns = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    in_key, in_value = columns[None, :] < head_dim, value_columns[None, :] < value_dim
    k = tl.load(k_ptr + key_row * kp + place * ks + columns[None, :], mask=live[:, None] & in_key, other=0.0)
    v = tl.load(v_ptr + key_row * vp + place * vs + value_columns[None, :], mask=live[:, None] & in_value, other=0.0)

    dk = tl.zeros([BLOCK, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK, VALUE_WIDTH], tl.float32)
    # a block in which no key counts adds nothing
    slabs = tl.where(tl.max(live.to(tl.int32), 0) > 0, tl.cdiv(rows, ROWS), 0)
    for slab in tl.range(0, slabs):
        row = slab * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        at = tile * rows + row
        stored = stored_at(tile, row, tiles, rows, size)
        q = tl.load(q_ptr + stored[:, None] * head_dim + columns[None, :], mask=inside[:, None] & in_key, other=0.0)
        of_values = stored[:, None] * value_dim + value_columns[None, :]
        grad_out = tl.load(grad_out_ptr + of_values, mask=inside[:, None] & in_value, other=0.0)
        centre = tl.load(centre_ptr + stored, mask=inside, other=0.0)
        # rows that see no key, and padding rows: weights of zero for any score
        lse = tl.load(lse_ptr + stored, mask=inside, other=-float("inf"))
        lse = tl.where(lse == -float("inf"), float("inf"), lse)
        limit = tl.load(limit_ptr + at, mask=inside, other=0)
        row_label, gap_low, gap_high = limit, limit, limit
        if LABELS:
            row_label = tl.load(row_label_ptr + at, mask=inside, other=0)
        if GAP:
            gap_low = tl.load(gap_low_ptr + at, mask=inside, other=0)
            gap_high = tl.load(gap_high_ptr + at, mask=inside, other=0)
        limit = tl.where(causal, limit, 2147483647)
        if ANY_LABELLED and LABELS:
            # a label that no key has
            row_label = tl.where(labelled, row_label, -9223372036854775807)
        # keys are the first axis here, so that sums over rows are plain products
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + bias[:, None]
        score = allowed(
            score, index[:, None], limit[None, :], row_label[None, :], label[:, None], gap_low[None, :], gap_high[None, :],
            ANY_CAUSAL, ANY_LABELLED and LABELS, GAP,
        )  # fmt: skip
        weight = tl.exp(score - lse[None, :])
        dv = tl.dot(weight.to(v.dtype), grad_out, dv, input_precision=PRECISION)
        slope = weight * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - centre[None, :])
        dk = tl.dot(slope.to(k.dtype), q, dk, input_precision=PRECISION)
    place += key_row * rows_of_keys
    in_key, in_value = live[:, None] & in_key, live[:, None] & in_value
    tl.atomic_add(dk_ptr + place * head_dim + columns[None, :], dk * scale, mask=in_key, sem="relaxed")
    tl.atomic_add(dv_ptr + place * value_dim + value_columns[None, :], dv, mask=in_value, sem="relaxed")


def cuts_of(q: Tensor, v: Tensor, capability: int) -> tuple[Shape, Shape]:
    """Choose the shapes of programs: those for queries, and those for keys."""
    for_cut = q.shape[2] * q.shape[3], widest(q, v), q.element_size(), capability
    return queries_shape_of(*for_cut), keys_shape_of(*for_cut)


def backward(
    grads: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    lists: Lists,
    scale: float,
    cuts: tuple[Shape, Shape] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradient of `forward` with respect to q, k and v, with fixed lists: `reference.backward` on a GPU.

    Args:
        grads: gradients of out and of lse.
        saved: q, k, v, out and lse of the forward pass.
        lists: the selection.
        scale: factor of the scores.
        cuts: shapes of programs; None uses `cuts_of`.

    Returns:
        gradients of q, k and v, in their dtypes.
    """
    q, k, v = saved[:3]
    dk, dv = (x.new_empty(x.shape, dtype=torch.float32) for x in (k, v))
    if not (q.shape[:4].numel() and k.shape[1]):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq = q.new_empty(by_head(q).shape)
    cut = cuts or cuts_of(q, v, capability_of(q))
    for launch in launches_backward(grads, saved, (dq, dk, dv), lists, scale, cut):
        launch.run()
    return dq.transpose(1, 2), dk.to(k.dtype), dv.to(v.dtype)


def launches_backward(
    grads: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    lists: Lists,
    scale: float,
    cuts: tuple[Shape, Shape],
) -> list[Launch]:
    """Prepare the launches, to run them in this order or to compile them for another machine.

    Args:
        grads: gradients of out and of lse.
        saved: q, k, v, out and lse of the forward pass.
        results: dq, ``[lists, group, tiles, size, head_dim]``, and dk and dv in float32, contiguous; all are written.
        lists: the selection.
        scale: factor of the scores.
        cuts: shapes of programs for queries and for keys.

    Returns:
        the launch for the queries, then the one for the keys, if any is listed.
    """
    q, k, v, out, lse = saved
    num_lists, tiles, group, size, head_dim = q.shape
    num_tiles, rows, value_dim = num_lists * tiles, group * size, v.shape[-1]
    lse = by_head(lse)
    width, value_width = (max(16, triton.next_power_of_2(x)) for x in (head_dim, value_dim))
    by_queries, by_keys = cuts
    keys, values = store_of(k, None), store_of(v, None)
    common: dict[str, Any] = {
        "q_ptr": by_head(q), "k_ptr": keys.data, "v_ptr": values.data, "lse_ptr": lse,
        "grad_out_ptr": by_head(grads[0].to(q.dtype)), "centre_ptr": torch.empty_like(lse),
        **row_tests_of(lists),
        "scale": scale, "num_tiles": num_tiles, "tiles": tiles, "rows": rows, "size": size, "keys": labels_in_a_row(lists),
        "head_dim": head_dim, "value_dim": value_dim,
        "kp": keys.strides[0], "ks": keys.strides[2], "vp": values.strides[0], "vs": values.strides[2],
        "PRECISION": precision_of(q), "WIDTH": width, "VALUE_WIDTH": value_width,
    }  # fmt: skip
    of_queries = {
        "out_ptr": by_head(out), "grad_lse_ptr": by_head(grads[1]), "dq_ptr": results[0],
        "dk_ptr": results[1], "dv_ptr": results[2],
        "key_numbers": results[1].numel(), "value_numbers": results[2].numel(), "ZEROED": _ZEROED,
        **groups_of(lists, by_queries.block),
        "ROWS": by_queries.rows, "num_warps": by_queries.warps, "num_stages": by_queries.stages,
    }  # fmt: skip
    launches = [Launch(_queries_kernel, (num_tiles * triton.cdiv(rows, by_queries.rows),), {**common, **of_queries})]
    groups = groups_of(lists, by_keys.block)
    del groups["BLOCKS"]
    of_keys = {
        **groups, "BLOCK": by_keys.block, "ANY_CAUSAL": any(lists.causal), "ANY_LABELLED": any(lists.labelled),
        "dk_ptr": results[1], "dv_ptr": results[2], "rows_of_keys": keys.keys,
        "ROWS": by_keys.rows, "num_warps": by_keys.warps, "num_stages": by_keys.stages,
    }  # fmt: skip
    blocks = sum(triton.cdiv(count, by_keys.block) for count in groups["slots"])
    if blocks:
        launches.append(Launch(_keys_kernel, (num_tiles * blocks,), {**common, **of_keys}))
    return launches
