"""Uniform numbers from counters in Triton: `random.uniform` in one launch, bit for bit."""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

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
    """Hash a pair of counters into a state, and a counter 0 behind them if wanted."""
    bits = _hashed(_hashed((second * 0 + state).to(tl.uint32), first), second)
    if LAST:
        bits = _hashed(bits, second * 0)
    return bits


@triton.jit(do_not_specialize=["state", "last"])
def _kernel(
    heads_ptr, index_ptr, out_ptr, state, last, count, kv_heads, HEADS: tl.constexpr, LAST: tl.constexpr,
    COUNTERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)
    there = at < count
    head = row % kv_heads + at * 0
    if HEADS:
        head = tl.load(heads_ptr + head)
    bits = bits_of_pair(state, head, tl.load(index_ptr + at, mask=there, other=0))
    if LAST:
        bits = _hashed(bits, head * 0 + last)
    # exact: a power of two
    tl.store(out_ptr + row * count + at, bits.to(tl.float64) * 2.3283064365386963e-10, mask=there)


@triton.jit(do_not_specialize=["state"])
def _counted_kernel(out_ptr, state, count, COUNTERS: tl.constexpr):
    at = (tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)).to(tl.int64)
    bits = _hashed((at * 0 + state).to(tl.uint32), at)
    tl.store(out_ptr + at, bits.to(tl.float64) * 2.3283064365386963e-10, mask=at < count)


def launch_counted(out: Tensor, state: int) -> Launch:
    """Prepare the launch of `operator_search.uniform_of_counters`, which writes into `out`."""
    arguments = {"out_ptr": out, "state": state - (state >> 31 << 32), "count": len(out), "COUNTERS": _COUNTERS}
    return Launch(_counted_kernel, (triton.cdiv(len(out), _COUNTERS),), {**arguments, "num_warps": 4})


def launch_uniform(heads: Tensor | None, index: Tensor, out: Tensor, state: int, last: int) -> Launch:
    """Prepare the launch of `operator_search.uniform_of_tiles`, which writes into `out`, ``[batch, kv_heads, tiles]``."""
    return Launch(
        _kernel,
        (triton.cdiv(out.shape[2], _COUNTERS), out.shape[0] * out.shape[1]),
        {
            "heads_ptr": index if heads is None else heads, "index_ptr": index, "out_ptr": out,
            # the same bits with a sign: always as wide
            "state": state - (state >> 31 << 32), "last": last, "count": out.shape[2], "kv_heads": out.shape[1],
            "HEADS": heads is not None, "LAST": last >= 0, "COUNTERS": _COUNTERS, "num_warps": 4,
        },
    )  # fmt: skip
