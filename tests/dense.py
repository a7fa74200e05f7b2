"""Attention written out: every query against every key. In float64 it is the reference, in any dtype plain PyTorch."""

import torch
from torch import Tensor

from hyperattention.methods.method import Method
from hyperattention.problem import Problem
from hyperattention.types import Runs, Selection


def visible(num_queries: int, num_keys: int, *, causal: bool = False, align: str = "upper_left") -> Tensor:
    """Who sees whom by position: ``[queries, keys]``."""
    everything = torch.ones(num_queries, num_keys, dtype=torch.bool)
    return everything.tril(num_keys - num_queries if align == "lower_right" else 0) if causal else everything


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    align: str = "upper_left",
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out and lse; `weight` multiplies the exponentials, ``[batch, heads, queries, keys]``."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    seen = visible(q.shape[2], k.shape[2], causal=causal, align=align).expand(*q.shape[:3], -1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
    if weight is not None:
        seen = seen & (weight > 0)
        scores = scores + weight.log().to(scores.dtype).masked_fill(weight == 0, 0.0)
    some = seen.any(-1, keepdim=True)
    # rows that see nothing go through the softmax with all keys, finitely, and are emptied afterwards
    scores = scores.masked_fill(~seen & some, -torch.inf)
    lse = scores.logsumexp(-1) if k.shape[2] else scores.sum(-1)
    out = (scores - lse[..., None]).exp() @ v
    return out.masked_fill(~some, 0.0), lse.masked_fill(~some[..., 0], -torch.inf)


def reference(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The same in float64."""
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options["attn_mask"] = mask.double()
    return attention(q.double(), k.double(), v.double(), **options)


def weights(method: Method, problem: Problem) -> Tensor:
    """Spread the lists of a method over a matrix: the weight of every pair, ``[batch, heads, queries, keys]``, keys by rank.

    No attention is computed: this reads what the stages decided, in every tiling, as the kernel's contract says.
    """
    shape = (*problem.q.shape[:3], problem.num_keys)
    total = torch.zeros(shape, dtype=torch.float64)
    for tiling, selection in method.selections(problem):
        rows = selection.row_limit
        weight = torch.zeros(*rows.shape, problem.num_keys, dtype=torch.float64)
        for run in selection.runs:
            index, live = listed(run)
            value = (run.log_weight.double().exp().repeat_interleave(run.size, 2) * live)[:, :, None]
            where = index.clamp(0, max(0, problem.num_keys - 1))[:, :, None]
            where, value = (x.expand(-1, -1, rows.shape[2], -1) for x in (where, value))
            weight.scatter_add_(3, where, value * ~_refused(selection, run, where))
        # which row of which tile holds each query
        place = tiling.restore(torch.arange(rows.numel()).view(rows.shape))
        total += weight.flatten(0, 2)[place]
    return total


def _refused(selection: Selection, run: Runs, key: Tensor) -> Tensor:
    refused = torch.zeros_like(key, dtype=torch.bool)
    if run.causal:
        refused |= key >= selection.row_limit[..., None]
    if selection.row_gap is not None:
        refused |= (key >= selection.row_gap[0][..., None]) & (key < selection.row_gap[1][..., None])
    if run.labelled and selection.row_label is not None and selection.key_label is not None:
        label = selection.key_label.gather(1, key.flatten(1)).view_as(key)
        refused |= label == selection.row_label[..., None]
    return refused


def listed(run: Runs) -> tuple[Tensor, Tensor]:
    """Every key of a run's slots, ``[lists, tiles, keys listed]``, and which of them count."""
    index = (run.first[..., None] + torch.arange(run.size)).flatten(2)
    live = (index >= run.low[..., None]) & (index < run.high[..., None])
    if run.hole is not None:
        live &= (index < run.hole[0][..., None]) | (index >= run.hole[1][..., None])
    return index, live & (run.log_weight.repeat_interleave(run.size, 2) > -torch.inf)
