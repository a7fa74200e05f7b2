"""Attention of a decoding step as torch operators: compilers see one node, and tensors without memory give shapes.

On a GPU they run the Triton kernels. Callers ask `decodes_fused` first, and run PyTorch's operators themselves otherwise: on
a CPU a step is short, and an operator of Python would take a good part of it.
"""

import torch
from torch import Tensor

from hyperattention.kernels.backend import triton_reads
from hyperattention.kernels.decode.page_plan import PagePlan
from hyperattention.transforms import refuse_vmap

# rows of a program: the queries of all heads of a group
_MOST_ROWS = 64


def decodes_fused(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the Triton kernels of a decoding step support these tensors; they have no gradient.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``.
        k: keys, ``[batch, kv_heads, keys, head_dim]``.
        v: values, ``[batch, kv_heads, keys, value_dim]``.

    Returns:
        whether they do: not on a CPU, for other dtypes than the list kernel reads, for more than 64 rows of a group, and
        where a gradient is wanted.
    """
    rows = q.shape[2] * (q.shape[1] // max(1, k.shape[1]))
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return rows <= _MOST_ROWS and not learning and q.dtype == k.dtype == v.dtype and triton_reads(q, k, v)


@torch.library.custom_op("hyperattention::decode_coreset", mutates_args=())
def decode_coreset(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor,
    length: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute attention of a few queries over a coreset: two launches, or one if lists are not split.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``.
        k: keys, ``[batch, kv_heads, slots, head_dim]``.
        v: values, ``[batch, kv_heads, slots, value_dim]``.
        log_weight: log-weight of each slot, ``[batch, kv_heads, slots]``; -inf for an empty slot.
        length: number of first slots of each list that count, ``[batch, kv_heads]``, so that a captured graph can serve a
            buffer that fills; None for all.
        sinks: learned sinks, ``[heads]``, whose share of the softmax is dropped; None for none.
        scale: factor of the scores.
        causal: whether the last slots are the queries' own keys, of which each query sees those up to its own.
        softcap: bound of the scores; None for none.

    Returns:
        out in the dtype of `q`, and lse in float32.
    """
    from hyperattention.kernels.decode import triton_coreset

    given = (q, k, v, log_weight, length, sinks)
    return triton_coreset.decode_coreset(*given, scale, causal=causal, softcap=softcap)


@decode_coreset.register_fake
def _(q, k, v, *rest):
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hyperattention::decode_best_pages", mutates_args=())
def decode_best_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary: Tensor,
    begin: Tensor,
    sinks: Tensor | None,
    plan: list[int],
    reach: float,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank and choose pages, and compute attention over sinks, chosen pages and window: two launches.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``.
        k: keys, ``[batch, kv_heads, keys, head_dim]``; pages are consecutive keys.
        v: values, ``[batch, kv_heads, keys, value_dim]``.
        summary: summaries of the pages before the window, ``[batch, kv_heads, pages, width]``, at most `MOST_PAGES`.
        begin: first key of each row, ``[batch]``, int64.
        sinks: learned sinks, ``[heads]``, whose share of the softmax is dropped; None for none.
        plan: the numbers of a `PagePlan`, in its order.
        reach: weight of the second half of a summary, as in `Bounds`.
        scale: factor of the scores.
        softcap: bound of the scores; None for none.

    Returns:
        out in the dtype of `q`, lse in float32, and the chosen pages ``[lists, queries, pages]``, int32, ascending,
        after -1 for every page that is missing.
    """
    from hyperattention.kernels.decode import triton_pages

    numbers = PagePlan(*plan)
    chosen = q.new_empty((k.shape[0] * k.shape[1], q.shape[2], numbers.num), dtype=torch.int32)
    given = (q, k, v, (summary, reach), chosen, begin, sinks)
    return *triton_pages.decode_pages(*given, numbers, scale, softcap=softcap), chosen


@decode_best_pages.register_fake
def _(q, k, v, summary, begin, sinks, plan, *rest):
    chosen = q.new_empty((k.shape[0] * k.shape[1], q.shape[2], PagePlan(*plan).num), dtype=torch.int32)
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32), chosen


@torch.library.custom_op("hyperattention::decode_pages", mutates_args=())
def decode_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    begin: Tensor,
    sinks: Tensor | None,
    plan: list[int],
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute attention over sinks, pages that are chosen already, and window: two launches.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``.
        k: keys, ``[batch, kv_heads, keys, head_dim]``.
        v: values, ``[batch, kv_heads, keys, value_dim]``.
        chosen: chosen pages, ``[lists, queries, pages]``; -1 for a missing page.
        begin: first key of each row, ``[batch]``, int64.
        sinks: learned sinks, ``[heads]``, whose share of the softmax is dropped; None for none.
        plan: the numbers of a `PagePlan`, in its order.
        scale: factor of the scores.
        softcap: bound of the scores; None for none.

    Returns:
        out in the dtype of `q`, and lse in float32.
    """
    from hyperattention.kernels.decode import triton_pages

    given = (q, k, v, None, chosen.contiguous(), begin, sinks)
    return triton_pages.decode_pages(*given, PagePlan(*plan), scale, softcap=softcap)


@decode_pages.register_fake
def _(q, k, v, *rest):
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


for _operator in (decode_best_pages, decode_coreset, decode_pages):
    refuse_vmap(_operator, "a decoding step")
