"""What a choice for alike queries needs before anything else, in Triton: three small tasks in one launch.

Programs average the first keys and values of each list, draw the first directions, or draw where inside a slot the points
of each list of queries lie. PyTorch does the same in some dozens of launches.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.choose.triton_alike_blocks import _length, _rows, shapes
from hyperattention.kernels.choose.triton_normal import normal_of
from hyperattention.kernels.choose.triton_sort_alike import DIRECTIONS, _finite
from hyperattention.kernels.choose.triton_uniform import bits_of_pair
from hyperattention.kernels.launch import Launch

# leading keys read at once, and numbers drawn by a program
_KEYS, _NUMBERS = 32, 256


@triton.jit
def _mean(x_ptr, count, s_row, column, DIM: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """Average the first rows, without what is not finite."""
    total = tl.zeros([WIDTH], tl.float32)
    for first in tl.range(0, count, KEYS):
        total += tl.sum(_finite(_rows(x_ptr, first + tl.arange(0, KEYS), count, s_row, column, DIM)), 0)
    return total / count


@triton.jit
def _centres(
    k_ptr, v_ptr, out_ptr, count, s_key, s_value, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    column, value_column = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    mean = _mean(k_ptr, count, s_key, column, DIM, KEYS, WIDTH)
    tl.store(out_ptr + column, mean, mask=column < DIM)
    centre = _mean(v_ptr, count, s_value, value_column, VALUE_DIM, KEYS, VALUE_WIDTH)
    tl.store(out_ptr + DIM + value_column, centre, mask=value_column < VALUE_DIM)
    total = tl.zeros([KEYS], tl.float32)
    for first in tl.range(0, count, KEYS):
        key = first + tl.arange(0, KEYS)
        x = _finite(_rows(v_ptr, key, count, s_value, value_column, VALUE_DIM) - centre[None, :])
        total += tl.where(key < count, _length(x), 0.0)
    tl.store(out_ptr + DIM + VALUE_DIM, tl.sum(total, 0) / count)


@triton.jit(do_not_specialize=["direction_state", "noise_state"])
def _kernel(
    k_ptr, v_ptr, centres_ptr, directions_ptr, index_ptr, heads_ptr, noise_ptr, key_row_ptr,
    count, lists, kv_heads, points, direction_state, noise_state, s_list, s_key, s_value_list, s_value,
    MANY: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    drawn: tl.constexpr = (DIM * COLUMNS + NUMBERS - 1) // NUMBERS
    if program < lists:
        one = program.to(tl.int64)
        tl.store(key_row_ptr + one, one)
        _centres(
            k_ptr + one * s_list, v_ptr + one * s_value_list, centres_ptr + one * (DIM + VALUE_DIM + 1), count, s_key,
            s_value, DIM, VALUE_DIM, KEYS, WIDTH, VALUE_WIDTH,
        )  # fmt: skip
    elif program < lists + drawn:
        at = ((program - lists) * NUMBERS + tl.arange(0, NUMBERS)).to(tl.int64)
        row, column = at // COLUMNS, at % COLUMNS
        # the axes where a query has no more numbers than directions
        number = tl.where(row == column, 1.0, 0.0)
        if DIM > COLUMNS:
            number = normal_of(bits_of_pair(direction_state, row, column)).to(tl.float32)
        tl.store(directions_ptr + at, number, mask=row < DIM)
    else:
        each = tl.cdiv(points, NUMBERS)
        one = ((program - lists - drawn) // each).to(tl.int64)
        at = ((program - lists - drawn) % each * NUMBERS + tl.arange(0, NUMBERS)).to(tl.int64)
        there = at < points
        head = one % kv_heads + at * 0
        if HEADS:
            head = tl.load(heads_ptr + head)
        second = tl.load(index_ptr + at // MANY, mask=there, other=0) * MANY + at % MANY
        # a counter 0 follows; exact: a power of two
        bits = bits_of_pair(noise_state, head, second, True)
        tl.store(noise_ptr + one * points + at, bits.to(tl.float64) * 2.3283064365386963e-10, mask=there)


def launch_first(
    k: Tensor, v: Tensor, index: Tensor, heads: Tensor | None, results: tuple[Tensor, Tensor, Tensor, Tensor], num: int,
    kv_heads: int, states: tuple[int, int],
) -> Launch:  # fmt: skip
    """Prepare the launch of `operator_alike.alike_first`, which writes into `results`."""
    centres, directions, noise, key_row = results
    points, drawn = noise.shape[1], triton.cdiv(directions.numel(), _NUMBERS)
    # the same bits with a sign: always as wide
    direction_state, noise_state = (state - (state >> 31 << 32) for state in states)
    return Launch(
        _kernel,
        (len(k) + drawn + len(k) * triton.cdiv(points, _NUMBERS),),
        {
            "centres_ptr": centres, "directions_ptr": directions, "index_ptr": index,
            "heads_ptr": index if heads is None else heads, "noise_ptr": noise, "key_row_ptr": key_row,
            "count": min(num, k.shape[1]), "lists": len(k), "kv_heads": kv_heads, "points": points,
            "direction_state": direction_state, "noise_state": noise_state, "MANY": points // max(1, len(index)),
            "HEADS": heads is not None, "KEYS": _KEYS, "COLUMNS": DIRECTIONS, "NUMBERS": _NUMBERS, **shapes(k, v),
            "num_warps": 4, "num_stages": 2,
        },
    )  # fmt: skip
