"""Scores of pages for the queries of a decoding step in Triton, one launch: `cache.page_rank.Bounds` and `Midpoint`.

A program scores some pages for the query heads of a kv head, which share the summaries it fetches. Beside the scores it
writes the log of their summed exponentials, from which the softmax over all pages is computed later, and a count of 0, by
which the programs that read the keys find out who is the last.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch, precision_of
from hyperattention.kernels.list.triton_forward import widest

# pages that a program scores, if their summaries fit its registers
_PAGES = 64


# numbers that grow from step to step are not compiled for
@triton.jit(do_not_specialize=["pages", "blocks"])
def _rank_kernel(
    q_ptr, summary_ptr, score_ptr, block_ptr, done_ptr, scale, cap, reach, pages, blocks, kv_heads, group, queries,
    q_batch, q_head, q_query, s_batch, s_head,
    SS: tl.constexpr, HEAD_DIM: tl.constexpr, REACH: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, PAGES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    list_number, query = tile // queries, (tile % queries).to(tl.int64)
    if block == 0:
        tl.store(done_ptr + tile, 0)
    batch, kv_head = (list_number // kv_heads).to(tl.int64), (list_number % kv_heads).to(tl.int64)
    row = tl.arange(0, ROWS)
    inside = row < group
    columns = tl.arange(0, WIDTH)
    in_key = columns[None, :] < HEAD_DIM
    q_at = q_ptr + batch * q_batch + (kv_head * group + row) * q_head + query * q_query
    q = tl.load(q_at[:, None] + columns[None, :], mask=inside[:, None] & in_key, other=0.0)
    page = block * PAGES + tl.arange(0, PAGES)
    there = page < pages
    summary_at = summary_ptr + batch * s_batch + kv_head * s_head + page.to(tl.int64)[:, None] * SS + columns[None, :]
    middle = tl.load(summary_at, mask=there[:, None] & in_key, other=0.0)
    score = tl.dot(q, tl.trans(middle), input_precision=PRECISION)
    if REACH:
        half = tl.load(summary_at + HEAD_DIM, mask=there[:, None] & in_key, other=0.0)
        score += reach * tl.dot(tl.abs(q), tl.trans(half), input_precision=PRECISION)
    score *= scale
    if CAPPED:
        # tanh, exact where the exponential is infinite
        score = cap * (1.0 - 2.0 / (tl.exp(score * (2.0 / cap)) + 1.0))
    score = tl.where(there[None, :], score, -float("inf"))
    at = tile.to(tl.int64) * group + row
    tl.store(score_ptr + at[:, None] * pages + page[None, :], score, mask=inside[:, None] & there[None, :])
    # every block has a page
    top = tl.max(score, 1)
    tl.store(block_ptr + at * blocks + block, top + tl.log(tl.sum(tl.exp(score - top[:, None]), 1)), mask=inside)


def pages_at_once(head_dim: int, itemsize: int) -> int:
    """Return how many pages a program scores.

    Args:
        head_dim: numbers of a key.
        itemsize: bytes of each.

    Returns:
        the number, a power of two.
    """
    return max(16, _PAGES * 256 // max(256, head_dim * itemsize))


def empty_scores(q: Tensor, kv_heads: int, pages: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `launch_rank` writes.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``.
        kv_heads: number of kv heads.
        pages: number of pages.

    Returns:
        scores ``[lists * queries, group, pages]``; the log-sum-exp of each block of pages; and for each list and query how
        many programs have read their share of its keys, ``[lists * queries]``, int32: none yet.
    """
    batch, heads, queries, head_dim = q.shape
    shape = (batch * kv_heads * queries, heads // kv_heads)
    blocks = triton.cdiv(pages, pages_at_once(head_dim, q.element_size()))
    score, of_blocks = (q.new_empty((*shape, count), dtype=torch.float32) for count in (pages, blocks))
    return score, of_blocks, q.new_empty(shape[:1], dtype=torch.int32)


def launch_rank(
    q: Tensor,
    summary: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    scale: float,
    reach: float,
    softcap: float | None,
) -> Launch:
    """Prepare the launch, to run it or to compile it for another machine.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``.
        summary: of every page, ``[batch, kv_heads, pages, width]``; the second half of a row is read if `reach` > 0.
        results: the result of `empty_scores`.
        scale: factor of the scores.
        reach: weight of the second half.
        softcap: bound of the scores; None for none.

    Returns:
        the launch.
    """
    (batch, heads, queries, head_dim), (kv_heads, pages) = q.shape, summary.shape[1:3]
    group, at_once = heads // kv_heads, pages_at_once(head_dim, q.element_size())
    return Launch(
        _rank_kernel,
        (batch * kv_heads * queries, triton.cdiv(pages, at_once)),
        {
            "q_ptr": q, "summary_ptr": summary, "score_ptr": results[0], "block_ptr": results[1], "done_ptr": results[2],
            "scale": scale, "cap": softcap or 1.0, "reach": reach, "pages": pages, "blocks": results[1].shape[2],
            "kv_heads": kv_heads, "group": group, "queries": queries,
            **{f"q_{name}": q.stride(axis) for axis, name in enumerate(("batch", "head", "query"))},
            "s_batch": summary.stride(0), "s_head": summary.stride(1), "SS": summary.stride(2), "HEAD_DIM": head_dim,
            "REACH": reach > 0, "CAPPED": softcap is not None, "PRECISION": precision_of(q, precise=True),
            "ROWS": max(16, triton.next_power_of_2(group)), "PAGES": at_once, "WIDTH": widest(q), "num_warps": 4,
        },
    )  # fmt: skip
