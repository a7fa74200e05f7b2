"""The mean of the first keys and their principal directions in Triton: one launch, a program for each list of keys.

`select.score.principal` does the same in PyTorch in float64, in some dozens of launches.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.choose.triton_normal import normal_of
from hyperattention.kernels.choose.triton_sort_alike import _finite, _multiplied, _orthonormal
from hyperattention.kernels.choose.triton_uniform import bits_of_pair
from hyperattention.kernels.launch import Launch

# keys read at once, rows of a square, and numbers drawn
_KEYS, _SLICE, _NUMBERS = 32, 16, 512


@triton.jit(do_not_specialize=["state"])
def _kernel(
    k_ptr, middle_ptr, basis_ptr, memory_ptr, count, width, s_list, s_key, state,
    ROUNDS: tl.constexpr, KEYS: tl.constexpr, dim: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    SLICE: tl.constexpr, NUMBERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    one = tl.program_id(0).to(tl.int64)
    column, to = tl.arange(0, DIM), tl.arange(0, WIDTH)
    k_ptr += one * s_list
    total = tl.zeros([DIM], tl.float32)
    for begin in tl.range(0, count, KEYS):
        key = begin + tl.arange(0, KEYS)
        read = (key < count)[:, None] & (column < dim)[None, :]
        at = key.to(tl.int64)[:, None] * s_key + column[None, :]
        total += tl.sum(tl.load(k_ptr + at, mask=read, other=0.0).to(tl.float32), 0)
    middle = total / count
    tl.store(middle_ptr + one * dim + column, middle, mask=column < dim)
    if ROUNDS > 0:
        middle = _finite(middle)
        products, sums = tl.zeros([DIM, DIM], tl.float32), tl.zeros([DIM], tl.float32)
        for begin in tl.range(0, count, KEYS):
            key = begin + tl.arange(0, KEYS)
            read = (key < count)[:, None] & (column < dim)[None, :]
            at = key.to(tl.int64)[:, None] * s_key + column[None, :]
            x = tl.load(k_ptr + at, mask=read, other=0.0).to(tl.float32)
            # what is no number counts as 0, far from the middle as it is
            x = tl.where(read, _finite(x) - middle[None, :], 0.0)
            products = tl.dot(tl.trans(x), x, products, input_precision=PRECISION)
            sums += tl.sum(x, 0)
        row, across = column[:, None], column[None, :]
        down = tl.sum(tl.where(row == across, sums[None, :], 0.0), 1)
        products = _finite(products - down[:, None] * (sums / count)[None, :])
        products /= tl.maximum(tl.max(tl.max(tl.abs(products), 1), 0), 1e-30)
        # out of memory, as registers hold no square beside the directions
        memory_ptr += one * dim * (dim + WIDTH)
        square = (column < dim)[:, None] & (column < dim)[None, :]
        tl.store(memory_ptr + column[:, None] * dim + column[None, :], products, mask=square)
        inside = (column < dim)[:, None] & (to < width)[None, :]
        # a few at a time, for numbers of 64 bits fill registers
        start_ptr = memory_ptr + dim * dim
        for begin in tl.range(0, dim * WIDTH, NUMBERS):
            at = (begin + tl.arange(0, NUMBERS)).to(tl.int64)
            number = normal_of(bits_of_pair(state, at // WIDTH, at % WIDTH)).to(tl.float32)
            tl.store(start_ptr + at, number, mask=at < dim * WIDTH)
        tl.debug_barrier()
        directions = tl.load(start_ptr + column[:, None] * WIDTH + to[None, :], mask=inside, other=0.0)
        tl.debug_barrier()
        for _ in tl.range(0, ROUNDS):
            image = _multiplied(
                memory_ptr, memory_ptr + dim * dim, directions, tl.float32, False, dim, DIM, SLICE, WIDTH, PRECISION
            )
            directions = _orthonormal(image, WIDTH)
        tl.store(basis_ptr + one * dim * width + column[:, None] * width + to[None, :], directions, mask=inside)


def launch_basis(k: Tensor, results: tuple[Tensor, Tensor], num: int, rounds: int, state: int) -> Launch:
    """Prepare the launch of `operator_search.key_basis`, which writes into `results`."""
    middle, basis = results
    k, dim = k if k.stride(2) == 1 else k.contiguous(), k.shape[2]
    width = basis.shape[2]
    padded = max(16, triton.next_power_of_2(max(1, width)))
    memory = middle.new_empty(max(1, len(k) * dim * (dim + padded) if width else 0))
    return Launch(
        _kernel,
        (len(k),),
        {
            "k_ptr": k, "middle_ptr": middle, "basis_ptr": basis, "memory_ptr": memory,
            "count": min(num, k.shape[1]), "dim": dim,
            "width": width,
            "s_list": k.stride(0), "s_key": k.stride(1), "state": state - (state >> 31 << 32),
            "ROUNDS": rounds if width else 0, "KEYS": _KEYS, "DIM": max(16, triton.next_power_of_2(dim)),
            "WIDTH": padded,
            "SLICE": _SLICE, "NUMBERS": _NUMBERS,
            "PRECISION": "ieee" if torch.version.hip else "tf32x3", "num_warps": 8, "num_stages": 1,
        },
    )  # fmt: skip
