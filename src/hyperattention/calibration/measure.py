"""Error and time of every candidate on the queries, keys and values of one layer."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.attention import attention
from hyperattention.error.judge import relative_error
from hyperattention.methods.base import AttentionMethod
from hyperattention.reference.call_recorder import CallInputs

# tokens of the warm-up calls: enough for every stage to list keys
_WARM_UP = 1024


@dataclass(frozen=True)
class Measurement:
    """Errors and times of the candidates on one layer and document.

    Args:
        document: number of the document.
        layer: index of the layer.
        shape: query heads, kv heads, head_dim and value_dim; layers of one shape take the same time.
        seconds: seconds of each candidate, for all heads together.
        errors: for each candidate and kv head, the mean relative error over the measured rows, of the worst query head.
        squares: for each candidate and kv head, squared errors over squared outputs, each summed over the measured rows and
            query heads; empty where only errors and times are measured.
    """

    document: int
    layer: int
    shape: tuple[int, int, int, int]
    seconds: tuple[float, ...]
    errors: tuple[tuple[float, ...], ...]
    squares: tuple[tuple[float, ...], ...] = ()


def run_on(call: CallInputs, method: AttentionMethod, seed: int = 0, num_tokens: int | None = None) -> Tensor:
    """Run a method on a call of a model, or on its first tokens.

    Args:
        call: the call's inputs.
        method: the method to run.
        seed: seed of the draws.
        num_tokens: number of first tokens; None for all.

    Returns:
        the output.
    """
    q, k, v = (x[:, :, :num_tokens] for x in (call.q, call.k, call.v))
    out = attention(
        q,
        k,
        v,
        method=method,
        is_causal=True,
        scale=call.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        layer=call.layer,
        seed=seed,
    )
    wait_for(out)
    return out


def wait_for(x: Tensor) -> None:
    """Wait until a tensor is computed, so that the time measured next includes its computation."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def measure_layer(call: CallInputs, ladder: Sequence[AttentionMethod], document: int, seed: int) -> Measurement:
    """Run every candidate once on one layer. Layers and documents are the repetitions, each in another order.

    The error is over all rows, not over a sample, because exact attention has to run for its time anyway.

    Args:
        call: the layer's inputs.
        ladder: the candidates, exact attention first.
        document: number of the document; the draws depend on it.
        seed: seed of the draws.

    Returns:
        errors and times of all candidates.
    """
    seconds, outputs = [0.0] * len(ladder), {}
    turn = 1 + (call.layer + document) % max(1, len(ladder) - 1)
    errors: list[tuple[float, ...]] = [()] * len(ladder)
    for place in (0, *range(turn, len(ladder)), *range(1, turn)):
        began = time.perf_counter()
        out = run_on(call, ladder[place], seed + document)
        seconds[place] = time.perf_counter() - began
        outputs.setdefault("exact", out)
        errors[place] = head_errors(out, outputs["exact"], call.k.shape[1])
    shape = (call.q.shape[1], call.k.shape[1], call.q.shape[-1], call.v.shape[-1])
    return Measurement(document, call.layer, shape, tuple(seconds), tuple(errors))


def warm_up(call: CallInputs, ladder: Sequence[AttentionMethod]) -> None:
    """Run every candidate once on a few tokens without timing, because the first call of a kind is slower."""
    for method in ladder:
        run_on(call, method, num_tokens=_WARM_UP)


def head_errors(out: Tensor, exact: Tensor, kv_heads: int) -> tuple[float, ...]:
    """Average the relative errors of rows, of the worst query head of each kv head.

    Args:
        out: the output of a method.
        exact: that of exact attention.
        kv_heads: number of kv heads.

    Returns:
        the error of each kv head.
    """
    reference = exact.float()
    errors = relative_error(out.float() - reference, reference).mean((0, 2))
    return tuple(errors.unflatten(0, (kv_heads, -1)).amax(1).tolist())
