"""A decoding step over sinks, the best pages and the window of a cache in Triton: choose, gather and attend in one launch.

A program takes one query of a kv head, with all query heads of the group. It finds the pages of the best scores among all
(`triton_rank` wrote the scores), and reads its share of the keys where they lie. Programs that share a list choose the same
pages, and the last of them merges what all have written. A page's score is the largest over the heads of the group, each
after its softmax over all pages.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.decode.page_plan import PagePlan, most_pages
from hyperattention.kernels.decode.triton_choose import choose, ranks_of
from hyperattention.kernels.decode.triton_parts import (
    DecodeShape,
    begun,
    decode_shape_of,
    done_last,
    empty_results,
    finished,
    launch_merge,
    merge_parts,
    scores_of,
    splits_of,
    taken,
)
from hyperattention.kernels.decode.triton_rank import empty_scores, launch_rank
from hyperattention.kernels.launch import Launch, precision_of
from hyperattention.kernels.list.triton_forward import widest

# scores of pages that a warp holds in registers while it chooses
_PAGES_OF_A_WARP = 1024
# numbers of chosen pages written at once, and numbers of parts that a warp holds while it merges them
_WRITTEN, _MERGED_BY_A_WARP = 64, 1024


@triton.jit
def _key_of(slot, chosen_ptr, num, begin, sinks, recent, seen, PAGE: tl.constexpr):
    """Return the key of each slot, and whether it counts: pages come first, then the window, then sinks."""
    of_pages, of_window = num * PAGE, seen - recent
    in_pages = slot < of_pages
    page = tl.load(chosen_ptr + slot // PAGE, mask=in_pages, other=-1).to(tl.int32)
    of_page = page * PAGE + slot % PAGE
    since = slot - of_pages
    window, sink = recent + since, begin + since - of_window
    key = tl.where(in_pages, of_page, tl.where(since < of_window, window, sink))
    # a page may begin within the sinks, and the window within padding
    first = tl.where(in_pages, begin + sinks, begin)
    end = tl.where(in_pages | (since >= of_window), recent, seen)
    end = tl.where(since >= of_window, tl.minimum(end, begin + sinks), end)
    # a missing page has keys below 0
    return key, (key >= first) & (key < end)


# numbers that grow from step to step are not compiled for
@triton.jit(do_not_specialize=["pages", "blocks", "recent", "seen", "splits"])
def _pages_kernel(
    q_ptr, k_ptr, v_ptr, score_ptr, block_ptr, done_ptr, chosen_ptr, begin_ptr, sink_ptr, out_ptr, lse_ptr,
    merged_ptr, merged_lse_ptr,
    scale, cap, pages, blocks, num, sinks, recent, seen, kv_heads, group, queries, splits,
    q_batch, q_head, q_query, k_batch, k_head, v_batch, v_head,
    KS: tl.constexpr, VS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr,
    CHOOSE: tl.constexpr, MERGE: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
    PAGES: tl.constexpr, WRITTEN: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    list_number, query = tile // queries, tile % queries
    batch, kv_head = (list_number // kv_heads).to(tl.int64), (list_number % kv_heads).to(tl.int64)
    begin = tl.load(begin_ptr + batch).to(tl.int32)
    chosen_ptr += tile.to(tl.int64) * num
    if CHOOSE:
        rank = ranks_of(score_ptr, block_ptr, tile, group, pages, blocks, begin + sinks, PAGE, PAGES)
        choose(rank, chosen_ptr, num, PAGES, WRITTEN)
        # what this program has written is read by all its threads
        tl.debug_barrier()
    row = tl.arange(0, ROWS)
    inside = row < group
    head = kv_head * group + row
    columns, value_columns = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    q_at = q_ptr + batch * q_batch + head * q_head + query.to(tl.int64) * q_query
    q = tl.load(q_at[:, None] + columns[None, :], mask=inside[:, None] & (columns[None, :] < HEAD_DIM), other=0.0)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    slots = num * PAGE + seen - recent + sinks
    share = tl.cdiv(tl.cdiv(slots, BLOCK), splits) * BLOCK
    end = tl.minimum(slots, (split + 1) * share)
    # the last key that the query sees: its own
    last = seen - queries + query

    top, total = begun(sink_ptr, head, inside, split, SINKS, ROWS)
    mean = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for first in tl.range(split * share, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        key, live = _key_of(slot, chosen_ptr, num, begin, sinks, recent, seen, PAGE)
        live = live & (slot < end) & (key <= last)
        at = tl.where(live, key, 0).to(tl.int64)[:, None]
        in_key, in_value = live[:, None], live[:, None]
        if WIDTH != HEAD_DIM:
            in_key = in_key & (columns[None, :] < HEAD_DIM)
        if VALUE_WIDTH != VALUE_DIM:
            in_value = in_value & (value_columns[None, :] < VALUE_DIM)
        k = tl.load(k_ptr + at * KS + columns[None, :], mask=in_key, other=0.0)
        v = tl.load(v_ptr + at * VS + value_columns[None, :], mask=in_value, other=0.0)
        score = tl.where(live[None, :], scores_of(q, k, scale, cap, CAPPED, PRECISION), -float("inf"))
        top, total, mean = taken(score, v, top, total, mean, PRECISION)

    mean, lse = finished(top, total, mean)
    lists = tl.num_programs(0) // queries
    stored = ((split.to(tl.int64) * lists + list_number) * group + row) * queries + query
    tl.store(lse_ptr + stored, lse, mask=inside)
    out_at = out_ptr + stored[:, None] * VALUE_DIM + value_columns[None, :]
    in_value = inside[:, None] & (value_columns[None, :] < VALUE_DIM)
    tl.store(out_at, mean.to(out_ptr.dtype.element_ty), mask=in_value)
    if MERGE:  # noqa: SIM102 - known to the compiler, and the other is not
        if done_last(done_ptr + tile, splits):
            of_group = tl.arange(0, HEADS)
            merged_row = (list_number.to(tl.int64) * group + of_group) * queries + query
            rows = lists * group * queries
            merge_parts(
                out_ptr, lse_ptr, merged_ptr, merged_lse_ptr, merged_row, of_group < group, splits, rows,
                HEADS, VALUE_DIM, VALUE_WIDTH, PARTS,
            )  # fmt: skip


def decode_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranked: tuple[Tensor, float] | None,
    chosen: Tensor,
    begin: Tensor,
    sinks: Tensor | None,
    plan: PagePlan,
    scale: float,
    *,
    softcap: float | None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention of a few queries over sinks, pages and window: see `operator.decode_pages`.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``.
        k: keys, ``[batch, kv_heads, keys, head_dim]``.
        v: values, ``[batch, kv_heads, keys, value_dim]``.
        ranked: summaries of all pages, and the weight of their second halves, to choose pages by; None if they are chosen.
        chosen: chosen pages, ``[lists, queries, pages]``; written if pages are ranked, then int32.
        begin: first key of each row, ``[batch]``.
        sinks: learned sinks, ``[heads]``; None for none.
        plan: what is read.
        scale: factor of the scores.
        softcap: bound of the scores; None for none.
        splits: programs that share a list; None chooses by the size of the device.

    Returns:
        out in the dtype of `q`, and lse in float32.
    """
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
    cut = decode_shape_of(q.shape[1] // k.shape[1], widest(q, v), q.element_size())
    lists = k.shape[0] * k.shape[1] * q.shape[2]
    splits = splits_of(lists, triton.cdiv(plan.slots, cut.block), q.device) if splits is None else splits
    results, parts = empty_results(q, v.shape[3], splits)
    if not results[1].numel():
        return results
    scores = None
    # who ranks pages counts from 0 how many programs of a list are done
    merged = None
    if ranked is not None:
        summary, reach = ranked
        scores = empty_scores(q, k.shape[1], summary.shape[2])
        if summary.shape[2]:
            launch_rank(q, summary, scores, scale, reach, softcap).run()
            merged = results if splits > 1 else None
    launch_pages((q, k, v, begin, sinks), scores, chosen, parts, merged, plan, scale, cut, softcap=softcap).run()
    if splits > 1 and merged is None:
        launch_merge(parts, results).run()
    return results


def launch_pages(
    given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    scores: tuple[Tensor, Tensor, Tensor] | None,
    chosen: Tensor,
    parts: tuple[Tensor, Tensor],
    merged: tuple[Tensor, Tensor] | None,
    plan: PagePlan,
    scale: float,
    cut: DecodeShape,
    *,
    softcap: float | None,
) -> Launch:
    """Prepare the launch, to run it or to compile it for another machine.

    Args:
        given: q, k, v, begin and sinks of `decode_pages`.
        scores: of pages, as `triton_rank` wrote them; None if pages are chosen.
        chosen: chosen pages, contiguous; written if there are scores.
        parts: out ``[splits, batch, heads, queries, value_dim]`` and lse without its last axis, to be written.
        merged: for out and lse, merged by the last program of each list; None leaves it to another launch. It takes scores.
        plan: what is read.
        scale: factor of the scores.
        cut: shape of a program.
        softcap: bound of the scores; None for none.

    Returns:
        the launch.
    """
    q, k, v, begin, sinks = given
    (batch, heads, queries, head_dim), kv_heads, value_dim = q.shape, k.shape[1], v.shape[3]
    group = heads // kv_heads
    # for what is not read the queries are passed
    score, block, done = scores or (q, q, q)
    out, lse = merged or (q, q)
    pages, blocks = (0, 0) if scores is None else (score.shape[2], block.shape[2])
    width, value_width = (max(16, triton.next_power_of_2(x)) for x in (head_dim, value_dim))
    warps, heads_at_once = max(cut.warps, min(16, most_pages(pages) // _PAGES_OF_A_WARP)), triton.next_power_of_2(group)
    return Launch(
        _pages_kernel,
        (batch * kv_heads * queries, len(parts[1])),
        {
            "q_ptr": q, "k_ptr": k, "v_ptr": v,
            "score_ptr": score, "block_ptr": block, "done_ptr": done, "merged_ptr": out, "merged_lse_ptr": lse,
            "chosen_ptr": chosen, "begin_ptr": begin, "sink_ptr": begin if sinks is None else sinks,
            "out_ptr": parts[0], "lse_ptr": parts[1], "scale": scale, "cap": softcap or 1.0,
            "pages": pages, "blocks": blocks, "num": plan.num, "sinks": plan.sinks, "recent": plan.recent,
            "seen": plan.seen, "kv_heads": kv_heads, "group": group, "queries": queries, "splits": len(parts[1]),
            **{f"q_{name}": q.stride(axis) for axis, name in enumerate(("batch", "head", "query"))},
            "k_batch": k.stride(0), "k_head": k.stride(1), "v_batch": v.stride(0), "v_head": v.stride(1),
            "KS": k.stride(2), "VS": v.stride(2), "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "PAGE": plan.page,
            "CHOOSE": scores is not None, "MERGE": merged is not None,
            "CAPPED": softcap is not None, "SINKS": sinks is not None,
            "PRECISION": precision_of(q), "PAGES": most_pages(pages), "WRITTEN": _WRITTEN,
            "ROWS": max(16, triton.next_power_of_2(group)), "BLOCK": cut.block,
            "HEADS": heads_at_once, "PARTS": max(1, _MERGED_BY_A_WARP * warps // (heads_at_once * value_width)),
            "WIDTH": width, "VALUE_WIDTH": value_width,
            "num_warps": warps, "num_stages": cut.stages,
        },
    )  # fmt: skip
