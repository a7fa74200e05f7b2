"""Attention over listed keys with products of features as a torch operator, with its shapes and its gradient."""

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.kernels.list.operator import fields
from hyperattention.kernels.list.reference import Lists
from hyperattention.kernels.listed_features import reference
from hyperattention.transforms import refuse_batched_gradients, refuse_second_derivatives, refuse_transforms, refuse_vmap
from hyperattention.types import Selection

_WHAT = "attention over features of listed keys"


@torch.library.custom_op("hyperattention::listed_features", mutates_args=())
def _listed_features(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_log_scale: Tensor,
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
) -> tuple[Tensor, Tensor]:
    tests = (row_label, key_label, gap_low, gap_high)
    lists = Lists(key_row, row_limit, first, size, log_weight, low, high, hole, causal, labelled, *tests)
    return reference.forward(query, key, value, key_log_scale, lists)


@_listed_features.register_fake
def _(query, key, value, *rest):
    dtype = reference.accumulation_dtype(query, key, value)
    return query.new_empty((*query.shape[:3], value.shape[-1]), dtype=dtype), query.new_empty(query.shape[:3], dtype=dtype)


@torch.library.custom_op("hyperattention::listed_features_backward", mutates_args=())
def _listed_features_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_log_scale: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tests = (row_label, key_label, gap_low, gap_high)
    lists = Lists(key_row, row_limit, first, size, log_weight, low, high, hole, causal, labelled, *tests)
    return reference.backward((grad_out, grad_lse), (query, key, value, key_log_scale, out, lse), lists)


@_listed_features_backward.register_fake
def _(grad_out, grad_lse, query, key, value, key_log_scale, *rest):
    return tuple(x.new_empty(x.shape) for x in (query, key, value, key_log_scale))


def _setup_context(ctx, inputs, output):
    query, key, value, scale, key_row, row_limit, first, size, log_weight, low, high, hole, causal, labelled, *tests = inputs
    saved = (query, key, value, scale, *output, key_row, row_limit, *first, *log_weight, *low, *high, *hole, *tests)
    ctx.save_for_backward(*saved)
    ctx.size, ctx.causal, ctx.labelled = size, causal, labelled


def _backward(ctx, grad_out, grad_lse):
    refuse_batched_gradients(_WHAT, grad_out, grad_lse)
    *tensors, key_row, row_limit = ctx.saved_tensors[:8]
    rest, n = ctx.saved_tensors[8:], len(ctx.size)
    first, log_weight, low, high, hole = (list(rest[i * n : (i + 1) * n]) for i in range(5))
    lists = (key_row, row_limit, first, ctx.size, log_weight, low, high, hole, ctx.causal, ctx.labelled, *rest[5 * n :])
    grads = _listed_features_backward(grad_out, grad_lse, *tensors, *lists)
    none = [None] * n
    return *grads, None, None, none, None, none, none, none, none, *[None] * 6


_listed_features.register_autograd(_backward, setup_context=_setup_context)
refuse_vmap(_listed_features, _WHAT)
refuse_second_derivatives(_listed_features_backward, _WHAT)


def listed_features(
    query: Float[Tensor, "lists tiles rows features"],
    key: Float[Tensor, "key_rows keys features"],
    value: Float[Tensor, "key_rows keys value_dim"],
    key_log_scale: Float[Tensor, "key_rows keys"],
    selection: Selection,
) -> tuple[Float[Tensor, "lists tiles rows value_dim"], Float[Tensor, "lists tiles rows"]]:
    """Compute attention of every tile over the keys on its list, with weights that are products of features.

    w_is = exp(b_s + log_weight_s) phi_i . psi_s,    out_i = sum_s w_is v_s / sum_s w_is

    Source: Chen et al., 2021 (arXiv:2110.15343), Scatterbrain: what the low-rank part says about the sparse support, to be
    taken out of it.   Differs: normalised rows and their logs, so that it is subtracted like any partial result.
    Cost: features + value_dim numbers gathered for each slot of a tile, and as many products for each row.
    Guarantee: exact for these weights.

    Args:
        query: phi, not negative, by tile.
        key: psi, not negative; list l reads row ``selection.key_row[l]``.
        value: values.
        key_log_scale: b.
        selection: the lists.

    Returns:
        normalised rows, and the natural log of each row's sum of weights, float32 (float64 if any of the first three is).
    """
    refuse_transforms(_WHAT, query, key, value, key_log_scale)
    return _listed_features(query, key, value, key_log_scale, *fields(selection))
