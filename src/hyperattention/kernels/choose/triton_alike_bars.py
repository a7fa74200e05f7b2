"""What each average's scores are compared with, in Triton: no score of a stretch of keys is written to memory.

The sum of exponentials of a stretch's scores is estimated by its moments, as `AlikeScan._log_sums` does in PyTorch.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def bar_averages(
    query_ptr, log_rows_ptr, moments_ptr, edges_ptr, bar_ptr, first_average, begin, until, size, bound,
    EDGES: tl.constexpr, MANY: tl.constexpr, OF_LIST: tl.constexpr, NORMAL: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STRETCHES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tell what the scores of some averages are compared with: see `AlikeScan.bars`.

    Args:
        query_ptr: averages of each group of some lists, ``[lists, OF_LIST, DIM]``.
        log_rows_ptr: half the logarithm of the queries in each, float32.
        moments_ptr: means of whole stretches beside half of their variances, ``[stretches, 2 * DIM]``.
        edges_ptr: edges of each tile, the last of which counts the keys that it may score, ``[tiles, EDGES]``.
        bar_ptr: for the result, float32.
        first_average: the first of the averages.
        begin: the list of average 0.
        until: the end of the lists.
        size: keys in a block.
        bound: of the result.
        EDGES: numbers of a tile in `edges_ptr`.
        MANY: lists of a tile.
        OF_LIST: averages of a list.
        NORMAL: blocks of a stretch.
        DIM: numbers of a key.
        ROWS: averages of this call.
        WIDTH: `DIM`, padded to a power of two.
        STRETCHES: stretches read at once.
        PRECISION: of products.
    """
    average, column = first_average + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    there = begin + average // OF_LIST < until
    query_at = query_ptr + average[:, None] * DIM + column[None, :]
    query = tl.load(query_at, mask=there[:, None] & (column < DIM)[None, :], other=0.0)
    square = (query.to(tl.float32) * query.to(tl.float32)).to(query.dtype)
    tile = (begin + average // OF_LIST) // MANY
    known = tl.load(edges_ptr + tile * EDGES + EDGES - 1, mask=there, other=0)
    known = known.to(tl.int32) // size // NORMAL
    log_size = tl.log((NORMAL * size).to(tl.float32))
    most = tl.sqrt(2.0 * log_size)
    largest, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    count = tl.max(known, 0)
    for first in tl.range(0, count, STRETCHES, num_stages=2):
        stretch = first + tl.arange(0, STRETCHES)
        read = (stretch < count)[None, :] & (column < DIM)[:, None]
        moments_at = moments_ptr + stretch[None, :] * (2 * DIM) + column[:, None]
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
    seen = tl.where(total > 0, largest + tl.log(tl.maximum(total, 1.1754943508222875e-38)) + log_size, -float("inf"))
    bar = seen - tl.load(log_rows_ptr + average, mask=there, other=0.0)
    tl.store(bar_ptr + average, tl.minimum(tl.maximum(bar, -bound), bound), mask=there)
