"""Lists of keys for queries that read sinks, chosen pages, draws from the other pages, and the window."""

import torch
from torch import Tensor

from hyperattention.kernels.decode.page_plan import PagePlan
from hyperattention.random import uniform
from hyperattention.types import Runs, Selection


def page_lists(
    rows: Tensor, chosen: Tensor, start: Tensor, plan: PagePlan, draws: int, counters: tuple[int, int]
) -> Selection:
    """List sinks, chosen pages, draws and the window for every query.

    Args:
        rows: queries, ``[batch, kv_heads, group, queries, head_dim]``.
        chosen: chosen pages, ``[lists, queries, pages]``, ascending; -1 for a missing page.
        start: first key of each row, ``[batch]``.
        plan: what is read beside the draws.
        draws: number of keys drawn from the other pages, with weights.
        counters: the first counters of every draw.

    Returns:
        the lists.
    """
    batch, kv_heads, group, queries, _ = rows.shape
    lists, device, recent = batch * kv_heads, rows.device, plan.recent
    begin = start[:, None].expand(-1, kv_heads).reshape(lists, 1).expand(-1, queries)
    sunk = begin + plan.sinks
    edge = torch.full_like(begin, recent)
    end, low = torch.full_like(begin, plan.seen), torch.maximum(begin, edge)
    head = torch.arange(lists, dtype=torch.int64, device=device)[:, None, None] % kv_heads
    runs = (
        Runs(begin[..., None], max(1, plan.sinks), _zeros(begin[..., None]), begin, torch.minimum(sunk, edge)),
        Runs(chosen * plan.page, plan.page, _zeros(chosen).masked_fill(chosen < 0, -torch.inf), sunk, edge),
        _drawn(chosen, sunk, edge, head, plan, draws, counters),
        Runs(edge[..., None], plan.seen - recent, _zeros(edge[..., None]), low, end, causal=queries > 1),
    )
    limit = torch.arange(queries, dtype=torch.int64, device=device) + (plan.seen - queries + 1)
    return Selection(
        runs,
        limit[None, :, None].expand(lists, -1, group).contiguous(),
        torch.arange(lists, dtype=torch.int64, device=device),
    )


def _drawn(
    chosen: Tensor, sunk: Tensor, edge: Tensor, head: Tensor, plan: PagePlan, draws: int, counters: tuple[int, int]
) -> Runs:
    """Draw keys evenly from the pages not chosen, one from each of equal strata, with weights."""
    queries = chosen.shape[1]
    first = sunk // plan.page  # sinks that lie in a page they cut can be drawn as well; such draws do not count
    pages = edge // plan.page
    inside = (chosen >= first[..., None]) & (chosen < pages[..., None])
    left = ((pages - first - inside.sum(-1)) * plan.page).clamp(min=0)  # [lists, queries]
    at = torch.arange(queries, dtype=torch.int64, device=chosen.device)[:, None] + (plan.seen - queries)
    place = torch.arange(draws, dtype=torch.int64, device=chosen.device)
    point = (place + uniform((*counters, head, at, place), chosen.device)) / draws
    rank = (point * left[..., None]).long().clamp(max=(left[..., None] - 1).clamp(min=0))
    # the index of the r-th page that is not chosen is r plus the number of chosen pages before it
    gap = torch.where(inside, chosen - first[..., None], 2**40).sort(-1).values
    gap = gap - torch.arange(gap.shape[-1], dtype=torch.int64, device=gap.device)
    page = rank // plan.page
    page = page + torch.searchsorted(gap, page, right=True) + first[..., None]
    share = left[..., None].float() / draws
    weight = share.clamp(min=1.0).log().expand(page.shape)
    # fewer keys than draws: each key is drawn several times, and each draw counts for its share
    weight = torch.where(left[..., None] < draws, share.log(), weight)
    return Runs(page * plan.page + rank % plan.page, 1, weight, sunk, edge)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)
