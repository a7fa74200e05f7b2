"""Rows of sorted tiles as torch operators for GPUs, with their gradients: one launch each. PyTorch does it on a CPU."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.transforms import refuse_batched_gradients, refuse_second_derivatives, refuse_vmap


def sort_rows(
    x: Float[Tensor, "batch heads queries width"],
    source: Int[Tensor, "lists tiles rows"],
    live: Bool[Tensor, "lists tiles rows"],
) -> Float[Tensor, "lists tiles rows width"]:
    """Sort rows into tiles.

    Args:
        x: the rows.
        source: the query in each sorted row, counted over the heads of a group.
        live: which sorted rows are not padding; each query has one.

    Returns:
        the sorted rows; padding repeats a query, which gets no gradient by it.
    """
    return _sort_rows(x, source, live)


def merge_rows(
    out: Float[Tensor, "batch heads queries width"],
    lse: Float[Tensor, "batch heads queries"],
    rows: tuple[Float[Tensor, "lists tiles rows width"], Float[Tensor, "lists tiles rows"]],
    source: Int[Tensor, "lists tiles rows"],
    live: Bool[Tensor, "lists tiles rows"],
) -> tuple[Float[Tensor, "batch heads queries width"], Float[Tensor, "batch heads queries"]]:
    """Merge attention over some keys with that of sorted rows over others: see `merge.merge`.

    Args:
        out: rows in the order of the queries.
        lse: their log-sum-exp.
        rows: sorted rows, and their log-sum-exp.
        source: as for `sort_rows`.
        live: as for `sort_rows`.

    Returns:
        the merged rows, in the order of the queries, and their log-sum-exp.
    """
    return _merge_rows(out, lse, *rows, source, live)


@torch.library.custom_op("hyperattention::sort_rows", mutates_args=())
def _sort_rows(x: Tensor, source: Tensor, live: Tensor) -> Tensor:
    from hyperattention.kernels.list import triton_sorted

    rows, x = x.new_empty((*source.shape, x.shape[3])), by_row(x)
    if rows.numel():
        triton_sorted.launch_move(x, rows, source.contiguous(), live.contiguous(), back=False).run()
    return rows


@_sort_rows.register_fake
def _(x, source, live):
    return x.new_empty((*source.shape, x.shape[3]))


@torch.library.custom_op("hyperattention::unsort_rows", mutates_args=())
def _unsort_rows(rows: Tensor, source: Tensor, live: Tensor, batch: int, heads: int, queries: int) -> Tensor:
    from hyperattention.kernels.list import triton_sorted

    x, rows = rows.new_empty((batch, heads, queries, rows.shape[3])), rows.contiguous()
    if rows.numel():
        triton_sorted.launch_move(x, rows, source.contiguous(), live.contiguous(), back=True).run()
    return x


@_unsort_rows.register_fake
def _(rows, source, live, batch, heads, queries):
    return rows.new_empty((batch, heads, queries, rows.shape[3]))


@torch.library.custom_op("hyperattention::merge_rows", mutates_args=())
def _merge_rows(
    out: Tensor, lse: Tensor, rows: Tensor, rows_lse: Tensor, source: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    from hyperattention.kernels.list import triton_sorted

    results = out.new_empty(out.shape), lse.new_empty(lse.shape)
    if out.numel():
        sorted_rows = rows.contiguous(), rows_lse.contiguous()
        given = by_row(out), lse, sorted_rows, source.contiguous(), live.contiguous()
        triton_sorted.launch_merge(*given, results).run()
    return results


@_merge_rows.register_fake
def _(out, lse, *rest):
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


@torch.library.custom_op("hyperattention::merge_rows_backward", mutates_args=())
def _merge_rows_backward(
    grad: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, rows: Tensor, rows_lse: Tensor,
    source: Tensor, live: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from hyperattention.kernels.list import triton_sorted

    results = _empty_gradients(out, lse, rows, rows_lse)
    if out.numel():
        given = (grad.contiguous(), grad_lse.contiguous()), by_row(out), lse, (rows.contiguous(), rows_lse.contiguous())
        places = source.contiguous(), live.contiguous()
        triton_sorted.launch_merge_backward(*given, places, results).run()
    return results


def _empty_gradients(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_out, d_lse, d_rows, d_rows_lse = (x.new_empty(x.shape) for x in tensors)
    return d_out, d_lse, d_rows, d_rows_lse


@_merge_rows_backward.register_fake
def _(grad, grad_lse, out, lse, rows, rows_lse, *rest):
    return _empty_gradients(out, lse, rows, rows_lse)


def by_row(x: Tensor) -> Tensor:
    """Let the numbers of a row be next to one another."""
    return x if x.stride(3) == 1 else x.contiguous()


def _setup_sort(ctx, inputs, output):
    x, source, live = inputs
    ctx.save_for_backward(source, live)
    ctx.shape = x.shape[:3]


def _backward_sort(ctx, grad):
    refuse_batched_gradients("attention to lists", grad)
    return _unsort_rows(grad, *ctx.saved_tensors, *ctx.shape), None, None


def _setup_merge(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_merge(ctx, grad, grad_lse):
    refuse_batched_gradients("attention to lists", grad, grad_lse)
    return *_merge_rows_backward(grad, grad_lse, *ctx.saved_tensors), None, None


_sort_rows.register_autograd(_backward_sort, setup_context=_setup_sort)
_merge_rows.register_autograd(_backward_merge, setup_context=_setup_merge)
for _operator in (_sort_rows, _merge_rows):
    refuse_vmap(_operator, "attention to lists")
for _operator in (_unsort_rows, _merge_rows_backward):
    refuse_second_derivatives(_operator, "attention to lists")
