"""The list kernel as a torch operator, with its shapes and its gradient: compilers see one node.

On a GPU it runs the Triton kernel if Triton is installed and supports the tensors, otherwise the PyTorch kernel.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.kernels.backend import triton_reads
from hyperattention.kernels.list import reference as list_torch
from hyperattention.transforms import refuse_batched_gradients, refuse_second_derivatives, refuse_transforms, refuse_vmap
from hyperattention.types import Runs, Selection


@torch.library.custom_op("hyperattention::list_attention", mutates_args=())
def _list_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_row: Tensor,
    row_limit: Tensor,
    first: list[Tensor],
    size: list[int],
    log_weight: list[Tensor],
    low: list[Tensor],
    high: list[Tensor],
    hole: list[Tensor],
    causal: list[bool],
    labelled: list[bool],
    row_label: Tensor | None,
    key_label: Tensor | None,
    gap_low: Tensor | None,
    gap_high: Tensor | None,
    table: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    lists = list_torch.Lists(
        key_row,
        row_limit,
        first,
        size,
        log_weight,
        low,
        high,
        hole,
        causal,
        labelled,
        row_label,
        key_label,
        gap_low,
        gap_high,
    )
    if triton_reads(q, k, v):
        from hyperattention.kernels.list import triton_choice as list_triton

        return list_triton.forward(q, k, v, lists, scale, table)
    out, lse = list_torch.forward(q.flatten(2, 3), k, v, lists, scale, table)
    return _head_by_head(out, q), _head_by_head(lse, q)


def _head_by_head(x: Tensor, q: Tensor) -> Tensor:
    """Split the rows of tiles by head, with the rows of each head consecutive, as those of `q` may be."""
    return x.unflatten(2, q.shape[2:4]).transpose(1, 2).contiguous().transpose(1, 2)


@_list_attention.register_fake
def _(q, k, v, *lists_and_scale):
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_lists, tiles, group, size, _ = q.shape
    out, lse = q.new_empty(num_lists, group, tiles, size, v.shape[-1]), q.new_empty(num_lists, group, tiles, size, dtype=acc)
    return out.transpose(1, 2), lse.transpose(1, 2)


@torch.library.custom_op("hyperattention::list_attention_backward", mutates_args=())
def _list_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_row: Tensor,
    row_limit: Tensor,
    first: list[Tensor],
    size: list[int],
    log_weight: list[Tensor],
    low: list[Tensor],
    high: list[Tensor],
    hole: list[Tensor],
    causal: list[bool],
    labelled: list[bool],
    row_label: Tensor | None,
    key_label: Tensor | None,
    gap_low: Tensor | None,
    gap_high: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = list_torch.Lists(
        key_row,
        row_limit,
        first,
        size,
        log_weight,
        low,
        high,
        hole,
        causal,
        labelled,
        row_label,
        key_label,
        gap_low,
        gap_high,
    )
    if triton_reads(q, k, v) and not torch.are_deterministic_algorithms_enabled():
        from hyperattention.kernels.list import triton_backward as list_triton_backward

        return list_triton_backward.backward((grad_out, grad_lse), (q, k, v, out, lse), lists, scale)
    grads, saved = ((x.flatten(2, 3) for x in pair) for pair in ((grad_out, grad_lse), (q, out, lse)))
    rows, out, lse = saved
    dq, dk, dv = list_torch.backward((next(grads), next(grads)), (rows, k, v, out, lse), lists, scale)
    return _head_by_head(dq, q), dk, dv


@_list_attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *rest):
    num_lists, tiles, group, size, head_dim = q.shape
    dq = q.new_empty(num_lists, group, tiles, size, head_dim).transpose(1, 2)
    return dq, k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, key_row, row_limit, first, size, log_weight, low, high, hole, causal, labelled, *tests, table, scale = inputs
    ctx.save_for_backward(q, k, v, *output, key_row, row_limit, *first, *log_weight, *low, *high, *hole, *tests)
    ctx.size, ctx.causal, ctx.labelled, ctx.scale, ctx.paged = size, causal, labelled, scale, table is not None


def _backward(ctx, grad_out, grad_lse):
    if ctx.paged:
        raise NotImplementedError("keys in pages have no gradient: call under torch.no_grad(), or without pages")
    refuse_batched_gradients("attention to lists", grad_out, grad_lse)
    q, k, v, out, lse, key_row, row_limit, *rest = ctx.saved_tensors
    n = len(ctx.size)
    first, log_weight, low, high, hole = (list(rest[i * n : (i + 1) * n]) for i in range(5))
    grads = _list_attention_backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        key_row,
        row_limit,
        first,
        ctx.size,
        log_weight,
        low,
        high,
        hole,
        ctx.causal,
        ctx.labelled,
        *rest[5 * n :],
        ctx.scale,
    )
    lists = [None] * n
    return *grads, None, None, lists, None, lists, lists, lists, lists, *[None] * 8


_list_attention.register_autograd(_backward, setup_context=_setup_context)
refuse_vmap(_list_attention, "attention to lists")
refuse_second_derivatives(_list_attention_backward, "attention to lists")


def _no_keys(selection: Selection) -> Runs:
    """Return one empty slot per tile, because the gradients of an operator need a list even if there are no keys."""
    empty = selection.row_limit[:, :, :1] * 0
    return Runs(
        empty, 1, torch.full(empty.shape, -torch.inf, dtype=torch.float32, device=empty.device), empty[..., 0], empty[..., 0]
    )


def list_attention(
    q: Float[Tensor, "lists tiles *rows head_dim"],
    k: Float[Tensor, "*key_rows keys head_dim"],
    v: Float[Tensor, "*key_rows keys value_dim"],
    selection: Selection,
    scale: float,
    table: Int[Tensor, "sequences pages"] | None = None,
) -> tuple[Float[Tensor, "lists tiles *rows value_dim"], Float[Tensor, "lists tiles *rows"]]:
    """Compute attention of every tile of queries over the keys on its list.

    Args:
        q: queries by tile, ``[lists, tiles, rows, head_dim]``, or with rows as heads of a group times positions,
            ``[lists, tiles, group, size, head_dim]``: such rows need no copy.
        k: keys, ``[key_rows, keys, head_dim]``; list l reads row ``selection.key_row[l]``. Or pages of them,
            ``[pages, kv_heads, page_size, head_dim]``; row ``s * kv_heads + h`` is head h of sequence s then.
        v: values, in the layout of the keys.
        selection: the lists.
        scale: factor of the scores.
        table: pages of each sequence in order, if keys lie in pages.

    Returns:
        normalised rows, and the natural log of each row's weighted sum of exponentials.
    """
    refuse_transforms("attention to lists", q, k, v)
    if q.ndim == 4:
        out, lse = list_attention(q[:, :, None], k, v, selection, scale, table)
        return out[:, :, 0], lse[:, :, 0]
    return _list_attention(q, k, v, *fields(selection), table, scale)


def fields(selection: Selection) -> tuple:
    """Flatten a selection to types of an operator's schema: the fields of `reference.Lists`, in their order."""
    runs = selection.runs or (_no_keys(selection),)
    return (
        selection.key_row,
        selection.row_limit,
        [r.first for r in runs],
        [r.size for r in runs],
        [r.log_weight for r in runs],
        [r.low for r in runs],
        [r.high for r in runs],
        [r.first.new_empty(0) if r.hole is None else torch.stack(r.hole) for r in runs],
        [r.causal for r in runs],
        [r.labelled for r in runs],
        selection.row_label,
        selection.key_label,
        *(selection.row_gap or (None, None)),
    )
