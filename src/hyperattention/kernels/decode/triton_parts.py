"""Shared parts of the Triton kernels of a decoding step: one block of a running softmax, and the merge of splits.

There are few queries, so that the keys of a list are split between programs. Each program writes its part in float32, and
parts are merged by their log-sum-exp, in a launch of their own or by the program of a list that is done last.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch

# programs for each multiprocessor
_WAVES = 2
_MOST_SPLITS = 256
# parts of a row that are read at once
_PARTS = 16
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class DecodeShape:
    """The shape of a program.

    Args:
        block: keys read at once.
        warps: warps of a program.
        stages: stages of software pipelining.
    """

    block: int
    warps: int
    stages: int


def decode_shape_of(rows: int, width: int, itemsize: int) -> DecodeShape:
    """Choose the shape of a program, so that its blocks of keys and values fit shared memory (tests compile every shape).

    Args:
        rows: rows of a program.
        width: numbers of the widest key or value, rounded up to a power of two.
        itemsize: bytes of each.

    Returns:
        the shape.
    """
    block = max(16, min(64, 16_384 // (width * itemsize)))
    if rows <= 16:
        return DecodeShape(block, 4, 3)
    if itemsize == 4:
        return DecodeShape(max(16, block // 2), 8, 2)
    # of narrow keys three blocks fit, and with two of them sm_80 spills 8 bytes
    return DecodeShape(block, 4, 3 if width <= 64 else 2)


def splits_of(lists: int, blocks: int, device: torch.device) -> int:
    """Return the number of programs that share the keys of a list, so that all programs fill the device.

    Args:
        lists: lists of keys.
        blocks: blocks of keys in a list.
        device: the device; one that is no GPU counts as one multiprocessor.

    Returns:
        the number, at least 1.
    """
    many = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(triton.cdiv(_WAVES * many, max(1, lists)), blocks, _MOST_SPLITS))


@triton.jit
def begun(sink_ptr, head, inside, split, SINKS: tl.constexpr, ROWS: tl.constexpr):
    """Return the largest score and the total weight of rows before any key: those of the learned sinks, counted once."""
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:  # noqa: SIM102 - known to the compiler, and the other is not
        if split == 0:
            top = tl.load(sink_ptr + head, mask=inside, other=0.0).to(tl.float32) * LOG2_E
            total += 1.0
    return top, total


@triton.jit
def scores_of(q, k, scale, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Return scores in powers of two, capped if the model caps them."""
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if CAPPED:
        # tanh, exact where the exponential is infinite
        score = cap * (1.0 - 2.0 / (tl.exp2(score * (2.0 * LOG2_E / cap)) + 1.0))
    return score * LOG2_E


@triton.jit
def taken(score, v, top, total, mean, PRECISION: tl.constexpr):
    """Add a block of keys to a running softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867)."""
    new_top = tl.maximum(top, tl.max(score, 1))
    # rows that saw no key take any finite number here: -inf minus -inf would be NaN
    centre = tl.where(new_top == -float("inf"), 0.0, new_top)
    weight = tl.exp2(score - centre[:, None])
    shrink = tl.exp2(top - centre)
    mean = tl.dot(weight.to(v.dtype), v, mean * shrink[:, None], input_precision=PRECISION)
    return new_top, total * shrink + tl.sum(weight, 1), mean


@triton.jit
def finished(top, total, mean):
    """Return the normalised rows and their log-sum-exp; a total that is not a number stays so."""
    empty = total == 0
    whole = tl.where(empty, 1.0, total)
    return mean / whole[:, None], tl.where(empty, -float("inf"), (top + tl.log2(whole)) * LN_2)


@triton.jit
def merge_parts(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, row, inside, splits, rows,
    ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of some rows, of which there are `rows` in all, `PARTS` at a time."""
    columns = tl.arange(0, VALUE_WIDTH)
    top, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for first in tl.range(0, splits, PARTS):
        part = first + tl.arange(0, PARTS)
        there = (part < splits)[:, None] & inside[None, :]
        at = part.to(tl.int64)[:, None] * rows + row[None, :]
        # other programs have written it: not what a multiprocessor may still hold
        lse = tl.load(part_lse_ptr + at, mask=there, other=-float("inf"), cache_modifier=".cg")
        out_at = part_ptr + at[:, :, None] * VALUE_DIM + columns[None, None, :]
        inner = there[:, :, None] & (columns < VALUE_DIM)[None, None, :]
        out = tl.load(out_at, mask=inner, other=0.0, cache_modifier=".cg")
        out = tl.where((lse != -float("inf"))[:, :, None], out, 0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        centre = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight, shrink = tl.exp(lse - centre[None, :]), tl.exp(top - centre)
        mean = mean * shrink[:, None] + tl.sum(out * weight[:, :, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new_top
    empty = total == 0
    whole = tl.where(empty, 1.0, total)
    tl.store(lse_ptr + row, tl.where(empty, -float("inf"), top + tl.log(whole)), mask=inside)
    merged = (mean / whole[:, None]).to(out_ptr.dtype.element_ty)
    in_value = inside[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(out_ptr + row[:, None] * VALUE_DIM + columns[None, :], merged, mask=in_value)


@triton.jit
def _merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, rows,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    merge_parts(
        part_ptr, part_lse_ptr, out_ptr, lse_ptr, row, row < rows, splits, rows, 1, VALUE_DIM, VALUE_WIDTH, PARTS
    )  # fmt: skip


@triton.jit
def done_last(done_ptr, splits):
    """Tell whether a program is the last of `splits` ones to come here, which may read what all of them have written."""
    # what other threads of this program have written comes before the count
    tl.debug_barrier()
    return tl.atomic_add(done_ptr, 1, sem="acq_rel") == splits - 1


def launch_merge(parts: tuple[Tensor, Tensor], results: tuple[Tensor, Tensor]) -> Launch:
    """Prepare the launch that merges the parts of rows over disjoint keys.

    Args:
        parts: out ``[splits, ..., value_dim]`` and lse ``[splits, ...]``, contiguous, in float32.
        results: out and lse without the first axis, contiguous, to be written.

    Returns:
        the launch.
    """
    value_dim = results[0].shape[-1]
    return Launch(
        _merge_kernel,
        (results[1].numel(),),
        {
            "part_ptr": parts[0], "part_lse_ptr": parts[1], "out_ptr": results[0], "lse_ptr": results[1],
            "splits": len(parts[1]), "rows": results[1].numel(), "VALUE_DIM": value_dim,
            "VALUE_WIDTH": triton.next_power_of_2(value_dim), "PARTS": _PARTS, "num_warps": 2,
        },
    )  # fmt: skip


def empty_results(q: Tensor, value_dim: int, splits: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Allocate what a step writes: its rows, and the parts that are merged into them.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``.
        value_dim: numbers of a value.
        splits: programs that share a list.

    Returns:
        out and lse, then their parts; with one split the parts are the results with one more axis.
    """
    shape = q.shape[:3]
    out, lse = q.new_empty((*shape, value_dim)), q.new_empty(shape, dtype=torch.float32)
    if splits == 1:
        return (out, lse), (out[None], lse[None])
    parts = q.new_empty((splits, *shape, value_dim), dtype=torch.float32), q.new_empty((splits, *shape), dtype=torch.float32)
    return (out, lse), parts
