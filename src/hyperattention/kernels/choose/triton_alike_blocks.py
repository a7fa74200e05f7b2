"""Blocks of keys for scores by alike queries in Triton: one launch centres keys, averages them and weighs their values.

A program takes some stretches of blocks of one size; each size is twice the one before.
`select.score.alike_scan.blocks_of` does the same in PyTorch.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.choose.triton_sort_alike import _finite
from hyperattention.kernels.launch import Launch

# blocks of a program at least
_BLOCKS = 64


@triton.jit
def _rows(x_ptr, row, count, s_row, column, DIM: tl.constexpr):
    """Load keys or values in float32, zeros from the last on."""
    read = (row < count)[:, None] & (column < DIM)[None, :]
    return tl.load(x_ptr + row.to(tl.int64)[:, None] * s_row + column[None, :], mask=read, other=0.0).to(tl.float32)


@triton.jit
def _length(x):
    return tl.sqrt(tl.sum(x * x, 1))


@triton.jit(do_not_specialize=["first"])
def _kernel(
    k_ptr, v_ptr, centre_ptr, keys_ptr, variance_ptr, moments_ptr, log_value_ptr,
    count, blocks, stretches, most, first, s_list, s_key, s_value_list, s_value,
    PLAIN: tl.constexpr, SEVERAL: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCKS: tl.constexpr,
    NORMAL: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    program, one = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # large blocks, which take longer, begin first
    level = tl.num_programs(2) - 1 - tl.program_id(2)
    size = 1
    if SEVERAL:
        size = first << level
    count = tl.minimum(count, blocks * size)
    # keys of this size, of all lists
    of = level * tl.num_programs(1) + one
    column, value_column = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    k_ptr += one * s_list
    v_ptr += one * s_value_list
    centre_ptr += one * (DIM + VALUE_DIM + 1)
    centre = tl.load(centre_ptr + column, mask=column < DIM, other=0.0)[None, :]
    value_centre = tl.load(centre_ptr + DIM + value_column, mask=value_column < VALUE_DIM, other=0.0)[None, :]
    usual = tl.load(centre_ptr + DIM + VALUE_DIM)
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    total, squares = tl.zeros([BLOCKS, WIDTH], tl.float32), tl.zeros([BLOCKS, WIDTH], tl.float32)
    far = tl.zeros([BLOCKS], tl.float32)
    for at in tl.range(0, size):
        key = block * size + at
        x = _finite(_rows(k_ptr, key, count, s_key, column, DIM) - centre)
        x = tl.where((key < count)[:, None], x, 0.0)
        total += x
        squares += x * x
        distance = _length(_finite(_rows(v_ptr, key, count, s_value, value_column, VALUE_DIM) - value_centre))
        # a value in the centre, or nothing to compare with: nothing is told
        log = tl.where(distance > 0, tl.log(distance / usual), -most)
        log = tl.where(usual > 0, log, tl.where(distance > 0, most, 0.0))
        far += tl.where(key < count, tl.minimum(tl.maximum(log, -most), most), 0.0)
    mean = total / size
    there = (block < blocks)[:, None] & (column < DIM)[None, :]
    out = (of * blocks + block)[:, None] * DIM + column[None, :]
    tl.store(keys_ptr + out, mean.to(keys_ptr.dtype.element_ty), mask=there)
    if level >= PLAIN:
        variance = tl.maximum(squares / size - mean * mean, 0.0)
        within = out - PLAIN * tl.num_programs(1).to(tl.int64) * blocks * DIM
        tl.store(variance_ptr + within, variance.to(variance_ptr.dtype.element_ty), mask=there)
    tl.store(log_value_ptr + of * blocks + block, far / size, mask=block < blocks)
    # sums over whole stretches
    middle = tl.sum(tl.reshape(total, (BLOCKS // NORMAL, NORMAL, WIDTH)), 1) / (NORMAL * size)
    square = tl.sum(tl.reshape(squares, (BLOCKS // NORMAL, NORMAL, WIDTH)), 1) / (NORMAL * size)
    half = 0.5 * tl.maximum(square - middle * middle, 0.0)
    stretch = program * (BLOCKS // NORMAL) + tl.arange(0, BLOCKS // NORMAL)
    moments_at = moments_ptr + (of * stretches + stretch)[:, None] * (2 * DIM) + column[None, :]
    whole = (stretch < stretches)[:, None] & (column < DIM)[None, :]
    tl.store(moments_at, middle.to(moments_ptr.dtype.element_ty), mask=whole)
    tl.store(moments_at + DIM, half.to(moments_ptr.dtype.element_ty), mask=whole)


def launch_blocks(
    k: Tensor, v: Tensor, centres: Tensor, results: tuple[Tensor, ...], size: int, normal: int, most: float
) -> Launch:
    """Prepare the launch of `operator_alike.alike_blocks`, which writes into `results`."""
    keys, variance, moments, log_value = results
    return Launch(
        _kernel,
        (triton.cdiv(keys.shape[2], max(_BLOCKS, normal)), k.shape[0], len(keys)),
        {
            "centre_ptr": centres, "keys_ptr": keys, "variance_ptr": variance,
            "moments_ptr": moments, "log_value_ptr": log_value, "count": k.shape[1], "blocks": keys.shape[2],
            "stretches": moments.shape[2], "most": most, "first": size, "PLAIN": len(keys) - len(variance),
            "SEVERAL": len(variance) > 0,
            "BLOCKS": max(_BLOCKS, normal), "NORMAL": normal, **shapes(k, v),
            "num_warps": 8, "num_stages": 2,
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
