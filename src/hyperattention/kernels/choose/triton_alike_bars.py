"""What each average's scores are compared with, in Triton: one launch, and no score of a stretch is written to memory.

A program takes some averages of alike queries, and all stretches of keys before their tiles: the sum of exponentials of a
stretch's scores is estimated by its moments, as `AlikeScan._log_sums` does in PyTorch.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch

# averages of a program, and stretches read at once
_ROWS, _STRETCHES = 64, 64


@triton.jit
def _kernel(
    query_ptr, log_rows_ptr, moments_ptr, edges_ptr, bar_ptr, averages, stretches, size, s_edges, log_size, bound,
    EDGES: tl.constexpr, OF_TILE: tl.constexpr, NORMAL: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
    STRETCHES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_of_keys = tl.program_id(1).to(tl.int64)
    # the last averages, which see most, begin first
    average = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    there, column = average < averages, tl.arange(0, WIDTH)
    at = row_of_keys * averages + average
    query_at = query_ptr + at[:, None] * DIM + column[None, :]
    query = tl.load(query_at, mask=there[:, None] & (column < DIM)[None, :], other=0.0)
    square = (query.to(tl.float32) * query.to(tl.float32)).to(query.dtype)
    known = tl.load(edges_ptr + row_of_keys * s_edges + average // OF_TILE * EDGES + EDGES - 1, mask=there, other=0)
    known = known.to(tl.int32) // size // NORMAL
    most = tl.sqrt(2.0 * log_size)
    largest, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    count = tl.max(known, 0)
    for first in tl.range(0, count, STRETCHES):
        stretch = first + tl.arange(0, STRETCHES)
        read = (stretch < count)[None, :] & (column < DIM)[:, None]
        moments_at = moments_ptr + (row_of_keys * stretches + stretch)[None, :] * (2 * DIM) + column[:, None]
        mean = tl.load(moments_at, mask=read, other=0.0)
        half = tl.dot(square, tl.load(moments_at + DIM, mask=read, other=0.0), input_precision=PRECISION)
        # normal scores, and sums of their few largest where these are more than all others: Derrida, 1981
        score = tl.where(half <= log_size, half, tl.sqrt(2.0 * tl.maximum(half, 0.0)) * most - log_size)
        score = tl.dot(query, mean, score, input_precision=PRECISION)
        score = tl.where(stretch[None, :] < known[:, None], score, -float("inf"))
        higher = tl.maximum(largest, tl.max(score, 1))
        # nothing known yet: any finite number will do
        base = tl.where(higher > -float("inf"), higher, 0.0)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(score - base[:, None]), 1)
        largest = higher
    seen = tl.where(total > 0, largest + tl.log(tl.maximum(total, 1e-38)) + log_size, -float("inf"))
    bar = seen - tl.load(log_rows_ptr + at, mask=there, other=0.0)
    tl.store(bar_ptr + at, tl.minimum(tl.maximum(bar, -bound), bound), mask=there)


def alike_bars(
    query: Tensor, log_rows: Tensor, moments: Tensor, edges: Tensor, size: int, normal: int, log_size: float, bound: float
) -> Tensor:
    """Tell what each average's scores are compared with: see `AlikeScan.bars`.

    Args:
        query: averages of each group, ``[lists, tiles, many, groups, width]``.
        log_rows: half the logarithm of the queries in each, ``[lists, tiles, many, groups]``, float32.
        moments: means of whole stretches beside half of their variances, ``[lists, stretches, 2 * width]``.
        edges: edges of each tile, the last of which counts the keys that it may score, ``[lists, tiles, 5]``.
        size: keys in a block.
        normal: blocks of a stretch.
        log_size: logarithm of the keys of a stretch.
        bound: of the result.

    Returns:
        ``[lists, tiles, many, groups]``, float32.
    """
    bar = torch.empty_like(log_rows)
    if bar.numel():
        launch_bars(query, log_rows, moments, edges, bar, size, normal, log_size, bound).run()
    return bar


def launch_bars(
    query: Tensor,
    log_rows: Tensor,
    moments: Tensor,
    edges: Tensor,
    bar: Tensor,
    size: int,
    normal: int,
    log_size: float,
    bound: float,
) -> Launch:
    """Prepare the launch of `alike_bars`, which writes into `bar`."""
    averages, width = bar[0].numel(), query.shape[4]
    # wide ones, twice as wide, would not fit the memory of a multiprocessor
    rows, stretches = (_ROWS, _STRETCHES) if width <= 128 else (_ROWS // 2, _STRETCHES // 2)
    return Launch(
        _kernel,
        (triton.cdiv(averages, rows), query.shape[0]),
        {
            "query_ptr": query.contiguous(), "log_rows_ptr": log_rows.contiguous(), "moments_ptr": moments.contiguous(),
            "edges_ptr": edges, "size": size, "s_edges": edges.stride(0), "EDGES": edges.shape[2],
            "bar_ptr": bar, "averages": averages, "stretches": moments.shape[1],
            "log_size": log_size, "bound": bound, "OF_TILE": bar[0, 0].numel(), "NORMAL": normal, "DIM": width,
            "ROWS": rows, "WIDTH": max(16, triton.next_power_of_2(width)), "STRETCHES": stretches,
            # estimates are in bfloat16; only tests have wider ones
            "PRECISION": "ieee", "num_warps": 4, "num_stages": 2,
        },
    )  # fmt: skip
