"""Uniform numbers from pairs of counters in Triton: `random.uniform` in one launch, bit for bit."""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch

_COUNTERS = 256


@triton.jit
def _mix(x):
    """Mix 32 bits: see `random._mix`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _hashed(state, counter):
    """Mix both halves of a counter in."""
    state = _mix((state ^ counter.to(tl.uint32)) + 0x85EBCA6B)
    return _mix((state ^ (counter >> 32).to(tl.uint32)) + 0xC2B2AE35)


@triton.jit
def bits_of_pair(state, first, second, LAST: tl.constexpr = False):
    """Hash a pair of counters, and a counter 0 behind them, into a state."""
    bits = _hashed(_hashed((second * 0 + state).to(tl.uint32), first), second)
    if LAST:
        bits = _hashed(bits, second * 0)
    return bits


@triton.jit(do_not_specialize=["state"])
def _kernel(first_ptr, second_ptr, out_ptr, state, count, MANY: tl.constexpr, LAST: tl.constexpr, COUNTERS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)
    there = at < count
    first = tl.load(first_ptr + row + at * 0, mask=there, other=0)
    second = tl.load(second_ptr + at // MANY, mask=there, other=0) * MANY + at % MANY
    bits = bits_of_pair(state, first, second, LAST)
    # exact: a power of two
    tl.store(out_ptr + row * count + at, bits.to(tl.float64) * 2.3283064365386963e-10, mask=there)


def uniform_of_pairs(first: Tensor, second: Tensor, state: int, many: int, last: bool) -> Tensor:
    """Hash every pair of a counter of `first` and one of `second`.

    Args:
        first: counters, int64.
        second: counters, int64; ``many * c + i`` is counted for each of these c and each i below `many`.
        state: what the counters before them were hashed to.
        many: counters for each of `second`.
        last: whether a counter 0 follows.

    Returns:
        numbers in [0, 1), ``[first, second * many]``, float64.
    """
    out = first.new_empty((len(first), len(second) * many), dtype=torch.float64)
    if out.numel():
        launch_uniform(first, second, out, state, last).run()
    return out


def launch_uniform(first: Tensor, second: Tensor, out: Tensor, state: int, last: bool) -> Launch:
    """Prepare the launch of `uniform_of_pairs`, which writes into `out`."""
    return Launch(
        _kernel,
        (triton.cdiv(out.shape[1], _COUNTERS), out.shape[0]),
        {
            "first_ptr": first.contiguous(), "second_ptr": second.contiguous(), "out_ptr": out,
            # the same bits with a sign: always as wide
            "state": state - (state >> 31 << 32), "count": out.shape[1], "MANY": out.shape[1] // len(second),
            "LAST": last, "COUNTERS": _COUNTERS, "num_warps": 4,
        },
    )  # fmt: skip
