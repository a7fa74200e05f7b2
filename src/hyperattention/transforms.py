"""torch transforms that a computation over lists of keys does not support: each is refused with an error that names it."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    maybe_current_level,
    maybe_get_level,
)
from torch.autograd import forward_ad

_FORWARD = "forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad)"
_BACKWARD = "torch.func.grad, or functions built on it (vjp, jacrev, hessian)"
_VMAP = "torch.func.vmap"
_NESTED = "a transform of torch.func inside another"
_REMEDIES = {
    _FORWARD: "take the gradient backward with torch.autograd.grad, or use method=Exact() through measured_attention",
    _BACKWARD: "call torch.autograd.grad on its output, or use method=Exact()",
    _NESTED: "use one at a time, or method=Exact() through measured_attention",
    _VMAP: "give the mapped axis as part of the batch axis, or use method=Exact()",
}


def transform_of(*tensors: Tensor) -> str | None:
    """Return the name of a transform that is active on some tensors and that key lists do not support.

    Args:
        *tensors: inputs of the computation.

    Returns:
        the transform; None if no transform is active, and for gradients taken by `backward`.
    """
    # torch has no public function for this; without a transform this is the only check, and compilers can trace it
    inside = maybe_current_level() is not None
    layers = [y for x in tensors for y in _layers(x)] if inside else []
    if any(is_batchedtensor(x) for x in layers):
        return _VMAP
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return _FORWARD
    # tensors made from plain tensors within a transform are wrapped as well, but require no gradient
    if any(x.requires_grad for x in layers):
        return _BACKWARD
    # a tensor wrapped by an outer transform may carry a tangent that an inner transform cannot read
    return _NESTED if any(maybe_get_level(x) != maybe_current_level() for x in layers) else None


def _layers(x: Tensor) -> Iterator[Tensor]:
    """Yield the wrapped tensor of each active transform, the innermost first."""
    while is_functorch_wrapped_tensor(x):
        yield x
        x = get_unwrapped(x)


def refuse_transforms(what: str, *tensors: Tensor) -> None:
    """Refuse the transforms that an operator has no rule for.

    Args:
        what: name of the computation, for the error.
        *tensors: inputs of the computation.

    Raises:
        NotImplementedError: if a transform is active; the message names the transform and the remedy.
    """
    transform = transform_of(*tensors)
    if transform is not None:
        raise NotImplementedError(f"{what} has no rule for {transform}: {_REMEDIES[transform]}")


def refuse_vmap(operator, what: str) -> None:
    """Let a torch operator refuse vmap.

    Args:
        operator: the custom operator.
        what: name of the computation, for the error.
    """

    def refuse(info, in_dims, *arguments):
        raise NotImplementedError(f"{what} has no rule for {_VMAP}: {_REMEDIES[_VMAP]}")

    operator.register_vmap(refuse)


def refuse_batched_gradients(what: str, *gradients: Tensor) -> None:
    """Refuse a backward pass that is mapped over a batch of gradients.

    Args:
        what: name of the computation, for the error.
        *gradients: gradients of the outputs.

    Raises:
        NotImplementedError: if the gradients are batched; the message names the option.
    """
    if torch.compiler.is_compiling():
        return
    if any(is_batchedtensor(x) or is_legacy_batchedtensor(x) for x in gradients):
        raise NotImplementedError(
            f"the gradient of {what} has no rule for is_grads_batched=True or vmap: take one gradient after the other, or "
            "use method=Exact()"
        )


def refuse_second_derivatives(operator, what: str) -> None:
    """Let the backward pass of an operator refuse second derivatives.

    Args:
        operator: the custom operator that is the backward pass.
        what: name of the computation, for the error.
    """

    def refuse(ctx, *gradients):
        raise NotImplementedError(
            f"{what} has no second derivatives: leave create_graph out, or use method=Exact() on float64 tensors"
        )

    operator.register_autograd(refuse)


def scale_of(scale: float | Tensor | None, head_dim: int) -> float:
    """Convert the factor of the scores to a number.

    Args:
        scale: the factor; None for 1 / sqrt(head_dim).
        head_dim: width of the keys.

    Returns:
        the factor.

    Raises:
        ValueError: if the factor is a tensor whose gradient would be lost.
    """
    if isinstance(scale, Tensor) and (scale.requires_grad or transform_of(scale) is not None):
        raise ValueError(
            f"scale is a tensor of shape {tuple(scale.shape)} that is differentiated or mapped over: a scale has no "
            "gradient; multiply query by it, and pass scale=1.0"
        )
    return float(head_dim**-0.5 if scale is None else scale)
