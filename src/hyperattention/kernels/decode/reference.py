"""A decoding step over the best pages in PyTorch: the specification of the Triton kernels, and the path of a CPU.

Most steps have no padding, one query, and more pages than are wanted. A caller that knows this says so (`complete`): then no
tensor is needed to tell which slots count.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.kernels import coreset as coreset_torch
from hyperattention.kernels.decode.page_plan import PagePlan


def best_pages(
    score: Float[Tensor, "batch kv_heads group queries pages"],
    begin: Int[Tensor, " batch"] | None,
    plan: PagePlan,
    *,
    complete: bool = False,
) -> Int[Tensor, "lists queries num"]:
    """Choose the pages of the best scores, the largest over the heads of a group after each head's softmax.

    Args:
        score: scores of all pages; -inf for a page that is excluded.
        begin: first key of each row; pages within sinks and padding are not chosen. None for rows without padding.
        plan: what is read.
        complete: whether it is certain that `plan.num` pages can be chosen; there is no padding then.

    Returns:
        the pages in ascending order, after -1 for every page that is missing.
    """
    # one head's softmax changes no order
    score = torch.log_softmax(score, -1).amax(2) if score.shape[2] > 1 else score[:, :, 0]
    pages, sunk = score.shape[3], plan.sinks // plan.page
    if complete:
        index = score[..., sunk:].topk(plan.num, -1, sorted=False).indices.sort(-1).values.flatten(0, 1)
        return index + sunk if sunk else index
    last = torch.arange(plan.page, (pages + 1) * plan.page, plan.page, dtype=torch.int64, device=score.device)
    bar = plan.sinks if begin is None else (begin + plan.sinks)[:, None, None, None]
    best, index = score.masked_fill(last <= bar, -torch.inf).topk(min(plan.num, pages), -1)
    index = index.masked_fill_(best == -torch.inf, -1).sort(-1).values.flatten(0, 1)
    return torch.nn.functional.pad(index, (max(0, plan.num - pages), 0), value=-1)


def attend_to_pages(
    q: Float[Tensor, "batch heads queries head_dim"],
    held: tuple[Float[Tensor, "batch kv_heads room head_dim"], Float[Tensor, "batch kv_heads room value_dim"]],
    chosen: Int[Tensor, "lists queries num"],
    begin: Int[Tensor, " batch"] | None,
    plan: PagePlan,
    scale: float,
    softcap: float | None,
    *,
    complete: bool = False,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Compute attention over sinks, chosen pages and the window.

    Args:
        q: queries of the last tokens.
        held: keys and values; those from `plan.seen` on are not read.
        chosen: chosen pages; -1 for a missing page.
        begin: first key of each row; None for rows without padding.
        plan: what is read.
        scale: factor of the scores.
        softcap: bound of the scores; None for no bound.
        complete: whether it is certain that no page is missing; there is no padding then.

    Returns:
        rows in the dtype of `q`, and their log-sum-exp.
    """
    (batch, kv_heads, room, _), queries = held[0].shape, q.shape[2]
    lists = batch * kv_heads
    index = _keys_of(chosen, begin, plan, kv_heads)
    weight = None
    if not complete or queries > 1:
        live = _counts(index, begin, plan, kv_heads)
        index = index.masked_fill(~live, 0)
        weight = _no_weights(index, q).masked_fill_(~live, -torch.inf).flatten(0, 1)
    elif plan.sinks % plan.page:
        # a page that begins within the sinks
        early = index[..., : -(plan.seen - plan.recent + plan.sinks)] < plan.sinks
        weight = _no_weights(index, q).flatten(0, 1)
        weight[:, : early.shape[2]].masked_fill_(early[:, 0], -torch.inf)
    row = torch.arange(0, lists * room, room, dtype=torch.int64, device=q.device)
    place = (index + row[:, None, None]).flatten()
    k, v = (x.flatten(0, 2).index_select(0, place).unflatten(0, (lists * queries, -1)) for x in held)
    rows = q.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(0, 2)[:, :, None]  # [lists * queries, group, 1, head_dim]
    out, lse = coreset_torch.forward(rows, k, v, weight, scale, softcap=softcap)

    def restored(x: Tensor) -> Tensor:
        return x[:, :, 0].unflatten(0, (batch, kv_heads, queries)).transpose(2, 3).flatten(1, 2)

    return restored(out), restored(lse)


def _no_weights(index: Tensor, q: Tensor) -> Tensor:
    return torch.zeros(index.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def _keys_of(chosen: Tensor, begin: Tensor | None, plan: PagePlan, kv_heads: int) -> Tensor:
    """List the keys of pages, window and sinks: ``[lists, queries, slots]``; some may not count."""
    lists, queries, _ = chosen.shape

    def from_to(first: int, end: int) -> Tensor:
        return torch.arange(first, end, dtype=torch.int64, device=chosen.device)

    pages = (chosen.long()[..., None] * plan.page + from_to(0, plan.page)).flatten(2)
    sinks = from_to(0, plan.sinks)
    if begin is not None:
        sinks = sinks + begin.repeat_interleave(kv_heads)[:, None, None]
    parts = from_to(plan.recent, plan.seen), sinks
    return torch.cat([pages, *(x.expand(lists, queries, -1) for x in parts)], -1)


def _counts(index: Tensor, begin: Tensor | None, plan: PagePlan, kv_heads: int) -> Tensor:
    """Return which of the listed keys count: each once, and none of padding or after its query."""
    queries, window = index.shape[1], plan.seen - plan.recent
    pages = index.shape[2] - window - plan.sinks
    first, end = (torch.zeros(index.shape[2], dtype=torch.int64, device=index.device) for _ in range(2))
    first[:pages] = plan.sinks
    end[:pages] = plan.recent
    end[pages : pages + window] = plan.seen
    end[pages + window :] = plan.recent
    if begin is not None:
        first = first + begin.repeat_interleave(kv_heads)[:, None, None]
    last = torch.arange(plan.seen - queries, plan.seen, dtype=torch.int64, device=index.device)
    return (index >= first) & (index < end) & (index <= last[:, None])
