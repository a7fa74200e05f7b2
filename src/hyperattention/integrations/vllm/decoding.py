"""Attention of requests that generate, over the best pages of their keys in vLLM's cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.integrations.vllm.decode_options import DecodeOptions
from hyperattention.integrations.vllm.page_summaries import PageSummaries
from hyperattention.integrations.vllm.pages import CachePages
from hyperattention.integrations.vllm.split import Piece
from hyperattention.kernels import coreset as coreset_torch
from hyperattention.kernels.decode.page_plan import PagePlan
from hyperattention.kernels.decode.reference import best_pages


@dataclass(frozen=True)
class DecodedRow:
    """A request that generates, and what its query reads; all layers share it.

    Args:
        piece: the query.
        plan: what it reads.
        blocks: the blocks of vLLM's cache that hold its keys, in order.
        complete: whether it is certain that as many pages are chosen as the plan says.
    """

    piece: Piece
    plan: PagePlan
    blocks: Tensor
    complete: bool


def decoded_rows(pieces: Sequence[Piece], table: Tensor, block_size: int, options: DecodeOptions) -> tuple[DecodedRow, ...]:
    """Prepare the requests of a step.

    Args:
        pieces: their queries.
        table: blocks of every request of the step.
        block_size: number of keys in a block.
        options: what is read.

    Returns:
        one row for each piece.
    """
    # pages of the best pairs alone may be fewer than are wanted
    complete = options.policy.by.kernel_reach is not None
    return tuple(
        DecodedRow(piece, options.plan(piece.keys), table[piece.request, : -(-piece.keys // block_size)].long(), complete)
        for piece in pieces
    )


def attend_to_best_pages(
    query: Float[Tensor, "heads head_dim"],
    pages: CachePages,
    cache: Tensor,
    summaries: PageSummaries,
    row: DecodedRow,
    scale: float,
) -> Float[Tensor, "heads head_dim"]:
    """Choose pages, and compute attention over sinks, chosen pages and the window.

    Args:
        query: the query of each head.
        pages: how the cache holds keys.
        cache: the cache of the layer.
        summaries: the side table.
        row: the request.
        scale: factor of the scores.

    Returns:
        the output of each head.
    """
    plan = row.plan
    rows = query.reshape(cache.shape[1], -1, query.shape[1])  # [kv_heads, group, head_dim]
    read = _chosen(rows, summaries, row, scale)
    weight = None
    if not row.complete:
        weight = _weights(read, plan)
        read = read.clamp(min=0)
    each = summaries.held.shape[2]
    held = pages.gather(cache, row.blocks[read // each], read % each, plan.page)
    # the last page of the window is not full
    k, v = (x[:, : plan.slots] for x in held)  # [kv_heads, slots, head_dim]
    out, _ = coreset_torch.forward(rows[:, :, None], k, v, weight, scale)
    return out.reshape(query.shape)


def _chosen(rows: Tensor, summaries: PageSummaries, row: DecodedRow, scale: float) -> Tensor:
    """List the pages of chosen keys, sinks and window, of each kv head: ``[kv_heads, pages]``; -1 for a missing page."""
    plan, by = row.plan, summaries.by
    before = plan.recent // plan.page

    def from_to(first: int, end: int) -> Tensor:
        return torch.arange(first, end, dtype=torch.int64, device=rows.device).expand(len(rows), -1)

    always = from_to(0, plan.sinks // plan.page), from_to(before, -(-plan.seen // plan.page))
    if not plan.num:
        return torch.cat(always, 1)
    # the blocks that hold the ranked pages
    used = row.blocks[: -(-before // summaries.held.shape[2])]
    # [1, kv_heads, group, pages]
    score = by.rank(rows[None].float() * scale, summaries.of_blocks(used)[:, :, :before], plan.num)
    best = best_pages(score[:, :, :, None], None, plan, complete=row.complete)
    return torch.cat([always[0], best[:, 0], always[1]], 1)


def _weights(pages: Tensor, plan: PagePlan) -> Tensor:
    """Return log-weights that leave out missing pages."""
    dead = (pages < 0)[:, :, None].expand(-1, -1, plan.page).flatten(1)[:, : plan.slots]
    return torch.zeros(dead.shape, dtype=torch.float32, device=pages.device).masked_fill_(dead, -torch.inf)
