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

# tokens of the calls that warm up: enough for every stage to have something to do
_WARM_UP = 1024


@dataclass(frozen=True)
class Measurement:
    """What the candidates did on one layer and document.

    Args:
        document: number of the document.
        layer: index of the layer.
        shape: query heads, kv heads, head_dim and value_dim: layers of one shape cost the same time.
        seconds: of each candidate, all heads together.
        errors: of each candidate, of each kv head: the mean relative error of all rows, of its worst query head.
    """

    document: int
    layer: int
    shape: tuple[int, int, int, int]
    seconds: tuple[float, ...]
    errors: tuple[tuple[float, ...], ...]


def run_on(call: CallInputs, method: AttentionMethod, seed: int = 0, num_tokens: int | None = None) -> Tensor:
    """Answer a call, or its beginning, as the model would.

    Args:
        call: the call's inputs.
        method: what runs.
        seed: of draws.
        num_tokens: leading tokens kept; None for all.

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
    """Wait until a tensor is computed, so that a clock read next tells its time."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def measure_layer(call: CallInputs, ladder: Sequence[AttentionMethod], document: int, seed: int) -> Measurement:
    """Run every candidate on one layer, once: layers and documents are the repetitions, each in another order.

    The error is that of all rows, not of a sample: exact attention has to run anyway, to be timed.

    Args:
        call: the layer's inputs.
        ladder: the candidates, exact attention first.
        document: number of the document, which enters the draws.
        seed: of draws.

    Returns:
        what was measured.
    """
    seconds, outputs = [0.0] * len(ladder), {}
    turn = 1 + (call.layer + document) % max(1, len(ladder) - 1)
    errors: list[tuple[float, ...]] = [()] * len(ladder)
    for place in (0, *range(turn, len(ladder)), *range(1, turn)):
        began = time.perf_counter()
        out = run_on(call, ladder[place], seed + document)
        seconds[place] = time.perf_counter() - began
        outputs.setdefault("exact", out)
        errors[place] = _errors(out, outputs["exact"], call.k.shape[1])
    shape = (call.q.shape[1], call.k.shape[1], call.q.shape[-1], call.v.shape[-1])
    return Measurement(document, call.layer, shape, tuple(seconds), tuple(errors))


def warm_up(call: CallInputs, ladder: Sequence[AttentionMethod]) -> None:
    """Run every candidate once on a short beginning, untimed: the first call of its kind is slower."""
    for method in ladder:
        run_on(call, method, num_tokens=_WARM_UP)


def _errors(out: Tensor, exact: Tensor, kv_heads: int) -> tuple[float, ...]:
    reference = exact.float()
    errors = relative_error(out.float() - reference, reference).mean((0, 2))
    return tuple(errors.unflatten(0, (kv_heads, -1)).amax(1).tolist())
