"""Blocks of keys for scores by alike queries in Triton: one launch centres keys, averages them and weighs their values.

A program takes a stretch of blocks. `select.score.alike_scan.blocks_of` does the same in PyTorch.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.choose.triton_sort_alike import _finite
from hyperattention.kernels.launch import Launch


@triton.jit
def _rows(x_ptr, row, count, s_row, column, DIM: tl.constexpr):
    """Load keys or values in float32, zeros from the last on."""
    read = (row < count)[:, None] & (column < DIM)[None, :]
    return tl.load(x_ptr + row.to(tl.int64)[:, None] * s_row + column[None, :], mask=read, other=0.0).to(tl.float32)


@triton.jit
def _length(x):
    return tl.sqrt(tl.sum(x * x, 1))


@triton.jit
def _kernel(
    k_ptr, v_ptr, centre_ptr, keys_ptr, variance_ptr, moments_ptr, log_value_ptr,
    count, blocks, stretches, most, s_list, s_key, s_value_list, s_value,
    SIZE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    stretch, one = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column, value_column = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    k_ptr += one * s_list
    v_ptr += one * s_value_list
    centre_ptr += one * (DIM + VALUE_DIM + 1)
    centre = tl.load(centre_ptr + column, mask=column < DIM, other=0.0)[None, :]
    value_centre = tl.load(centre_ptr + DIM + value_column, mask=value_column < VALUE_DIM, other=0.0)[None, :]
    usual = tl.load(centre_ptr + DIM + VALUE_DIM)
    block = stretch * BLOCKS + tl.arange(0, BLOCKS)
    total, squares = tl.zeros([BLOCKS, WIDTH], tl.float32), tl.zeros([BLOCKS, WIDTH], tl.float32)
    far = tl.zeros([BLOCKS], tl.float32)
    for at in tl.range(0, SIZE):
        key = block * SIZE + at
        x = _finite(_rows(k_ptr, key, count, s_key, column, DIM) - centre)
        x = tl.where((key < count)[:, None], x, 0.0)
        total += x
        squares += x * x
        distance = _length(_finite(_rows(v_ptr, key, count, s_value, value_column, VALUE_DIM) - value_centre))
        # a value in the centre, or nothing to compare with: nothing is told
        log = tl.where(distance > 0, tl.log(distance / usual), -most)
        log = tl.where(usual > 0, log, tl.where(distance > 0, most, 0.0))
        far += tl.where(key < count, tl.minimum(tl.maximum(log, -most), most), 0.0)
    mean = total / SIZE
    there = (block < blocks)[:, None] & (column < DIM)[None, :]
    out = (one * blocks + block)[:, None] * DIM + column[None, :]
    tl.store(keys_ptr + out, mean.to(keys_ptr.dtype.element_ty), mask=there)
    if SIZE > 1:
        variance = tl.maximum(squares / SIZE - mean * mean, 0.0)
        tl.store(variance_ptr + out, variance.to(variance_ptr.dtype.element_ty), mask=there)
    tl.store(log_value_ptr + one * blocks + block, far / SIZE, mask=block < blocks)
    if stretch < stretches:
        middle = tl.sum(total, 0) / (BLOCKS * SIZE)
        half = 0.5 * tl.maximum(tl.sum(squares, 0) / (BLOCKS * SIZE) - middle * middle, 0.0)
        moments_at = moments_ptr + (one * stretches + stretch) * (2 * DIM) + column
        tl.store(moments_at, middle.to(moments_ptr.dtype.element_ty), mask=column < DIM)
        tl.store(moments_at + DIM, half.to(moments_ptr.dtype.element_ty), mask=column < DIM)


def alike_blocks(
    k: Tensor, v: Tensor, centres: Tensor, size: int, normal: int, most: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Average keys over blocks: see `blocks_of`.

    Args:
        k: keys, ``[lists, keys, width]``.
        v: their values.
        centres: from `operator_alike.alike_first`.
        size: keys in a block.
        normal: blocks of a stretch.
        most: bound of the logarithms.
        dtype: dtype of averages and variances.

    Returns:
        means of blocks, and variances inside them where they have several keys, ``[lists, blocks, width]``; means of whole
        stretches beside half of their variances, ``[lists, stretches, 2 * width]``; and logarithms of how far values lie,
        ``[lists, blocks]``, float32.
    """
    blocks = -(-k.shape[1] // size)
    keys = k.new_empty((k.shape[0], blocks, k.shape[2]), dtype=dtype)
    variance = keys.new_empty(keys.shape if size > 1 else 0)
    moments = keys.new_empty(k.shape[0], k.shape[1] // (normal * size), 2 * k.shape[2])
    log_value = centres.new_empty(k.shape[0], blocks)
    if keys.numel():
        launch_blocks(k, v, centres, (keys, variance, moments, log_value), size, normal, most).run()
    return keys, variance, moments, log_value


def launch_blocks(
    k: Tensor, v: Tensor, centres: Tensor, results: tuple[Tensor, ...], size: int, normal: int, most: float
) -> Launch:
    """Prepare the launch of `alike_blocks`, which writes into `results`."""
    keys, variance, moments, log_value = results
    return Launch(
        _kernel,
        (triton.cdiv(keys.shape[1], normal), k.shape[0]),
        {
            "centre_ptr": centres, "keys_ptr": keys, "variance_ptr": variance,
            "moments_ptr": moments, "log_value_ptr": log_value, "count": k.shape[1], "blocks": keys.shape[1],
            "stretches": moments.shape[1], "most": most, "SIZE": size, "BLOCKS": normal, **shapes(k, v),
            "num_warps": 4 if size == 1 and max(k.shape[2], v.shape[2]) <= 128 else 8, "num_stages": 2,
        },
    )  # fmt: skip


def shapes(k: Tensor, v: Tensor) -> dict:
    """Return the arguments that tell a kernel where keys and values lie.

    Args:
        k: keys, ``[lists, keys, width]``.
        v: their values.

    Returns:
        arguments by name.
    """
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    return {
        "k_ptr": k, "v_ptr": v, "s_list": k.stride(0), "s_key": k.stride(1), "s_value_list": v.stride(0),
        "s_value": v.stride(1), "DIM": k.shape[2], "VALUE_DIM": v.shape[2],
        "WIDTH": max(16, triton.next_power_of_2(k.shape[2])), "VALUE_WIDTH": max(16, triton.next_power_of_2(v.shape[2])),
    }  # fmt: skip
