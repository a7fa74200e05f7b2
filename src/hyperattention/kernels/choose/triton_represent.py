"""Representatives and moments of blocks in Triton: one launch a level, which passes over the keys once.

`select.score.representatives` does the same in PyTorch, in some thirty launches a level. A program takes a block.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch

# keys read at once
_KEYS = 64


@triton.jit
def _kernel(
    keys_ptr, among_ptr, summary_ptr, far_ptr, moments_ptr, keys, blocks, width, candidates, s_among,
    SIZE: tl.constexpr, MEANS: tl.constexpr, FAR: tl.constexpr, AMONG: tl.constexpr, MOMENTS: tl.constexpr,
    KEYS: tl.constexpr, CANDIDATES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block, one = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    wide = column < width
    keys_ptr += (one * keys + block * SIZE) * width
    at = one * blocks + block
    candidate = tl.arange(0, CANDIDATES)
    taken = candidate < candidates
    if FAR > 0:
        source = keys_ptr + candidate[:, None] * width
        if AMONG > 0:
            # some keys of each part of the block
            source = among_ptr + (one * s_among + block * candidates + candidate)[:, None] * width
        x = tl.load(source + column[None, :], mask=taken[:, None] & wide[None, :], other=0.0)
        nearest = tl.where(taken, float("inf"), -1.0)
    sums, squares = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    summary_ptr += at * (MEANS + FAR) * width
    for part in tl.range(0, MEANS):
        total = tl.zeros([WIDTH], tl.float32)
        for begin in tl.range(0, SIZE // MEANS, KEYS):
            key = begin + tl.arange(0, KEYS)
            inside = (key < SIZE // MEANS)[:, None] & wide[None, :]
            some = tl.load(
                keys_ptr + (part * (SIZE // MEANS) + key)[:, None] * width + column[None, :], mask=inside, other=0.0
            )
            total += tl.sum(some, 0)
            squares += tl.sum(some * some, 0)
        sums += total
        mean = total / (SIZE // MEANS)
        tl.store(summary_ptr + part * width + column, mean.to(summary_ptr.dtype.element_ty), mask=wide)
        if FAR > 0:
            off = x - mean[None, :]
            nearest = tl.minimum(nearest, tl.sum(off * off, 1))
    for place in tl.range(0, FAR):
        farthest = tl.argmax(nearest, 0)
        one_of = tl.sum(tl.where((candidate == farthest)[:, None], x, 0.0), 0)
        tl.store(far_ptr + (at * FAR + place) * width + column, one_of, mask=wide)
        tl.store(summary_ptr + (MEANS + place) * width + column, one_of.to(summary_ptr.dtype.element_ty), mask=wide)
        off = x - one_of[None, :]
        nearest = tl.minimum(nearest, tl.sum(off * off, 1))
    if MOMENTS:
        mean = sums / SIZE
        variance = tl.maximum(squares / SIZE - mean * mean, 0.0)
        moments_ptr += at * 2 * width + column
        tl.store(moments_ptr, mean.to(moments_ptr.dtype.element_ty), mask=wide)
        tl.store(moments_ptr + width, variance.to(moments_ptr.dtype.element_ty), mask=wide)


def launch_represent(
    keys: Tensor, among: Tensor | None, results: tuple[Tensor, Tensor, Tensor], size: int, means: int
) -> Launch:
    """Prepare the launch of `operator_search.represent`, which writes into `results`."""
    summary, far, moments = results
    blocks, candidates = summary.shape[1], size
    if among is not None:
        candidates = among.shape[1] * among.shape[2] // blocks
    return Launch(
        _kernel,
        (blocks, keys.shape[0]),
        {
            "keys_ptr": keys, "among_ptr": keys if among is None else among, "summary_ptr": summary, "far_ptr": far,
            "moments_ptr": moments, "keys": keys.shape[1], "blocks": blocks, "width": keys.shape[2],
            "candidates": candidates, "s_among": blocks * candidates, "SIZE": size, "MEANS": means, "FAR": far.shape[2],
            "AMONG": among is not None, "MOMENTS": moments.numel() > 0,
            "KEYS": min(_KEYS, triton.next_power_of_2(size // means)),
            "CANDIDATES": max(16, triton.next_power_of_2(candidates)) if far.shape[2] else 16,
            "WIDTH": max(16, triton.next_power_of_2(keys.shape[2])), "num_warps": 1 if size * keys.shape[2] <= 2048 else 4,
        },
    )  # fmt: skip
