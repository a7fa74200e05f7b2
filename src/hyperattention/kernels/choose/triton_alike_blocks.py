"""Blocks of keys for scores by alike queries in Triton: one launch centres keys, averages them and weighs their values.

A program takes some blocks of one size; each size is four times the one before.
`select.score.key_blocks.blocks_of` does the same in PyTorch.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.choose.triton_sort_alike import _finite
from hyperattention.kernels.launch import Launch

# blocks of a program
_BLOCKS = 64


@triton.jit
def _rows(x_ptr, row, count, s_row, column, DIM: tl.constexpr):
    """Load keys or values in float32, zeros from the last on."""
    read = (row < count)[:, None] & (column < DIM)[None, :]
    return tl.load(x_ptr + row.to(tl.int64)[:, None] * s_row + column[None, :], mask=read, other=0.0).to(tl.float32)


@triton.jit
def _length(x):
    return tl.sqrt(tl.sum(x * x, 1))


@triton.jit
def blocks_before(count, level):
    """Count the whole blocks of all sizes below a level: of one key, of 4, 16, ..."""
    before = count * 0
    for lower in tl.range(0, level):
        before += count >> 2 * lower
    return before


@triton.jit
def _kernel(
    k_ptr, v_ptr, centre_ptr, keys_ptr, variance_ptr, log_value_ptr,
    count, in_all, most, s_list, s_key, s_value_list, s_value,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    program, one = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # large blocks, which take longer, begin first
    level = tl.num_programs(2) - 1 - tl.program_id(2)
    blocks, size = count >> 2 * level, 1 << 2 * level
    if program * BLOCKS < blocks:
        column, value_column = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
        k_ptr += one * s_list
        v_ptr += one * s_value_list
        centre_ptr += one * (DIM + VALUE_DIM + 1)
        centre = tl.load(centre_ptr + column, mask=column < DIM, other=0.0)[None, :]
        value_centre = tl.load(centre_ptr + DIM + value_column, mask=value_column < VALUE_DIM, other=0.0)[None, :]
        usual = tl.load(centre_ptr + DIM + VALUE_DIM)
        block = program * BLOCKS + tl.arange(0, BLOCKS)
        total, squares = tl.zeros([BLOCKS, WIDTH], tl.float32), tl.zeros([BLOCKS, WIDTH], tl.float32)
        far, behind = tl.zeros([BLOCKS], tl.float32), blocks * size
        for at in tl.range(0, size):
            key = block * size + at
            x = _finite(_rows(k_ptr, key, behind, s_key, column, DIM) - centre)
            total += x
            squares += x * x
            distance = _length(_finite(_rows(v_ptr, key, behind, s_value, value_column, VALUE_DIM) - value_centre))
            # a value in the centre, or nothing to compare with: nothing is told
            log = tl.where(distance > 0, tl.log(distance / usual), -most)
            log = tl.where(usual > 0, log, tl.where(distance > 0, most, 0.0))
            far += tl.minimum(tl.maximum(log, -most), most)
        mean = total / size
        there = (block < blocks)[:, None] & (column < DIM)[None, :]
        before = blocks_before(count, level)
        out = (one * in_all + before + block)[:, None] * DIM + column[None, :]
        tl.store(keys_ptr + out, mean.to(keys_ptr.dtype.element_ty), mask=there)
        if level > 0:
            variance = tl.maximum(squares / size - mean * mean, 0.0)
            within = (one * (in_all - count) + before - count + block)[:, None] * DIM + column[None, :]
            tl.store(variance_ptr + within, variance.to(variance_ptr.dtype.element_ty), mask=there)
        far = (far / size).to(log_value_ptr.dtype.element_ty)
        tl.store(log_value_ptr + one * in_all + before + block, far, mask=block < blocks)


def launch_blocks(k: Tensor, v: Tensor, centres: Tensor, results: tuple[Tensor, ...], levels: int, most: float) -> Launch:
    """Prepare the launch of `operator_alike.alike_blocks`, which writes into `results`."""
    keys, variance, log_value = results
    return Launch(
        _kernel,
        (triton.cdiv(k.shape[1], _BLOCKS), k.shape[0], levels),
        {
            "centre_ptr": centres, "keys_ptr": keys, "variance_ptr": variance, "log_value_ptr": log_value,
            "count": k.shape[1], "in_all": keys.shape[1], "most": most, "BLOCKS": _BLOCKS, **shapes(k, v),
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
