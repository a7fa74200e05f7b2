"""A method as one torch operator, for graphs: compilers and export see one node at every length.

Traced stage by stage, a method's lists became thousands of nodes, and each length needed its own graph. Calls use this
operator only while a graph is traced. It runs the same code as an eager call and draws the same keys; backward runs the
forward pass again.
"""

import json

import torch
from torch import Tensor

from hyperattention.files.fields import Field
from hyperattention.files.method_table import METHODS_OF_CALLS
from hyperattention.methods.base import AttentionMethod
from hyperattention.problem import Problem
from hyperattention.types import Partial


def is_opaque(method: object) -> bool:
    """Return whether a method can be named in a graph: all its types are the package's own."""
    return METHODS_OF_CALLS.knows(method)


def write_method(method: object) -> str:
    """Write a method as JSON, by means that a compiler can trace: a graph holds it as a constant.

    Args:
        method: one for which `is_opaque` is true.

    Returns:
        a text that names every type and argument.
    """
    return _text(METHODS_OF_CALLS.write(method))


def _text(value: object) -> str:
    """Do what json.dumps does, which cannot be traced."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{','.join([_text(each) for each in value])}]"
    if isinstance(value, dict):
        return f"{{{','.join([_text(name) + ':' + _text(each) for name, each in value.items()])}}}"
    return str(value)


def attend_opaque(
    problem: Problem, method: AttentionMethod, with_lse: bool, with_error: bool
) -> tuple[Partial | Tensor, Tensor | None]:
    """Put a call into a graph as one node.

    Args:
        problem: the problem, of all heads, its queries side by side.
        method: the method that runs.
        with_lse: whether the lse is asked for.
        with_error: whether the standard error is asked for.

    Returns:
        the output rows, the lse if asked for, and the standard errors if asked for.
    """
    out, lse, error = _run_method(
        problem.q,
        problem.k,
        problem.v,
        problem.rank,
        write_method(method),
        problem.scale,
        problem.causal,
        problem.offset,
        problem.seed,
        problem.layer,
        with_lse or with_error,
        with_error,
    )
    return (Partial(out, lse) if with_lse or with_error else out), (error if with_error else None)


def _read_method(text: str) -> AttentionMethod:
    method = METHODS_OF_CALLS.read(Field(json.loads(text), "a graph", "", "trace the call again"))
    assert isinstance(method, AttentionMethod)
    return method


@torch.library.custom_op("hyperattention::run_method", mutates_args=())
def _run_method(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: Tensor | None,
    method: str,
    scale: float,
    causal: bool,
    offset: int,
    seed: int,
    layer: int,
    with_lse: bool,
    with_error: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    problem, run = Problem(q, k, v, scale, causal, offset, rank, seed, layer), _read_method(method)
    error = None
    if with_error:
        partial, error = run.attend_with_error(problem)
    else:
        partial = run.attend(problem) if with_lse else Partial(run.output(problem), _nothing(q))
    out = partial.out.to(q.dtype)
    return _own(out), _own(partial.lse), _own(_nothing(q) if error is None else error)


def _accumulated(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _nothing(q: Tensor) -> Tensor:
    return q.new_empty((0, 0, 0), dtype=_accumulated(q))


def _own(x: Tensor) -> Tensor:
    # an operator must not return a view of its inputs
    return x.clone(memory_format=torch.contiguous_format)


@_run_method.register_fake
def _(q, k, v, rank, method, scale, causal, offset, seed, layer, with_lse, with_error):
    rows = q.new_empty(q.shape[:3], dtype=_accumulated(q))
    lse, error = (torch.empty_like(rows) if asked else _nothing(q) for asked in (with_lse, with_error))
    return q.new_empty((*q.shape[:3], v.shape[3])), lse, error


@torch.library.custom_op("hyperattention::run_method_backward", mutates_args=())
def _run_method_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: Tensor | None,
    method: str,
    scale: float,
    causal: bool,
    offset: int,
    seed: int,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    run = _read_method(method)
    # an operator runs below autograd, but backward needs autograd here
    below = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with below, torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        problem = Problem(q, k, v, scale, causal, offset, rank, seed, layer)
        if grad_lse is None:
            grads = torch.autograd.grad(run.output(problem).to(q.dtype), (q, k, v), grad_out)
        else:
            partial = run.attend(problem)
            grads = torch.autograd.grad((partial.out.to(q.dtype), partial.lse), (q, k, v), (grad_out, grad_lse))
    grad_q, grad_k, grad_v = grads
    return _own(grad_q), _own(grad_k), _own(grad_v)


@_run_method_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, rank, *ctx.options, with_lse, _ = inputs
    ctx.with_lse = with_lse
    ctx.save_for_backward(q, k, v, rank)
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx, grad_out, grad_lse, _):
    grads = _run_method_backward(grad_out, grad_lse if ctx.with_lse else None, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * 9


_run_method.register_autograd(_differentiate, setup_context=_setup_context)
