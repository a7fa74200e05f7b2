"""Exact attention and its lse by torch's fused kernel for CPUs, as an operator with a complete gradient.

Torch's own operator returns the lse without a gradient, and does not support causal rows at the end of longer keys. Here
such rows are two calls, one over all keys before them and one over the square on the diagonal, merged by their lse.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.merge import merge
from hyperattention.transforms import refuse_batched_gradients, refuse_second_derivatives
from hyperattention.types import Partial

# up to this many rows of a group are folded into one matrix, which reads keys once; for more rows the copy costs too much
FOLDED_ROWS = 4096
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_flash(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys head_dim"],
    scale: float,
    *,
    causal: bool,
) -> Partial:
    """Compute exact attention for rows that each see at least one key.

    Source: torch's fused kernel. With the lse of all keys, the weights of each part equal those of the entire softmax, so
    torch's own backward kernel differentiates the parts one by one.
    Cost: that of the pairs seen; memory linear in rows and keys, with gradients too.   Guarantee: exact.

    Args:
        q: queries; query head h reads kv head h // (heads // kv_heads), which is not repeated.
        k: keys.
        v: values, as wide as the keys.
        scale: factor of the scores.
        causal: whether rows see no key after their own position, where the last row stands at the last key.

    Returns:
        rows in the dtype given, and lse in float32 (float64 for float64), both with gradients.
    """
    return Partial(*_cpu_flash(q, k, v, scale, causal))


def _parts(rows: int, keys: int, causal: bool) -> tuple[tuple[int, int, bool], ...]:
    """Return the calls: first and end of their keys, and whether they lie on the diagonal."""
    if not causal:
        return ((0, keys, False),)
    before = keys - rows
    return ((0, before, False), (before, keys, True)) if before else ((0, keys, True),)


def _rows_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    # the kernel reads rows that are not contiguous incorrectly, without an error
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


@torch.library.custom_op("hyperattention::cpu_flash", mutates_args=())
def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = _rows_first(q, k, v)
    partials = [
        _attend(q, k[:, :, first:end], v[:, :, first:end], scale, square)
        for first, end, square in _parts(q.shape[2], k.shape[2], causal)
    ]
    merged = merge(partials)
    return merged.out.contiguous(), merged.lse.contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, square: bool) -> Partial:
    group, rows = q.shape[1] // k.shape[1], q.shape[2]
    if square or group == 1 or group * rows > FOLDED_ROWS:
        return Partial(*_forward(q, k, v, 0.0, square, scale=scale))
    folded = _forward(q.unflatten(1, (k.shape[1], group)).flatten(2, 3), k, v, 0.0, False, scale=scale)
    out, lse = (x.unflatten(2, (group, rows)).flatten(1, 2) for x in folded)
    return Partial(out, lse)


@_cpu_flash.register_fake
def _(q, k, v, scale, causal):
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=acc)


@torch.library.custom_op("hyperattention::cpu_flash_backward", mutates_args=())
def _cpu_flash_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad_out = _rows_first(q, k, v, grad_out)
    width = v.shape[3]
    if grad_lse is not None:
        # the kernel subtracts sum_c grad_out_ic out_ic from every score's gradient. The gradient of lse enters as one more
        # column of out; a column of zeros in v leaves everything else unchanged
        q, k, v = (pad(x, (0, 1)) for x in (q, k, v))
        out = torch.cat([out, -grad_lse[..., None].to(out.dtype)], -1)
        grad_out = pad(grad_out, (0, 1), value=1.0)
    grad_q = torch.zeros_like(q, dtype=lse.dtype)
    grad_k, grad_v = [], []
    for first, end, square in _parts(q.shape[2], k.shape[2], causal):
        seen = slice(first, end)
        # with the lse of all keys, the weights of each part equal those of the entire softmax
        part_q, part_k, part_v = _backward(grad_out, q, k[:, :, seen], v[:, :, seen], out, lse, 0.0, square, scale=scale)
        grad_q += part_q
        grad_k.append(part_k[..., :width])
        grad_v.append(part_v[..., :width])
    return grad_q[..., :width].to(q.dtype).contiguous(), torch.cat(grad_k, 2), torch.cat(grad_v, 2)


@_cpu_flash_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, scale, causal):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_lse):
    given = [x for x in (grad_out, grad_lse) if x is not None]
    refuse_batched_gradients("exact attention with lse by the kernel of a CPU", *given)
    q, k, v, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _cpu_flash_backward(grad_out, grad_lse, q, k, v, out, lse, ctx.scale, ctx.causal)
    return *grads, None, None


_cpu_flash.register_autograd(_differentiate, setup_context=_setup_context)
refuse_second_derivatives(_cpu_flash_backward, "exact attention with lse by the kernel of a CPU")
