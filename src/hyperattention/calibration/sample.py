"""Errors of every candidate on evenly spaced parts of one layer: a long text is calibrated on in minutes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperattention.calibration.measure import Measurement, head_errors
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact
from hyperattention.problem import Problem
from hyperattention.random import uniform
from hyperattention.reference.call_recorder import CallInputs

# queries of a part, whole tiles of every candidate, and the number of parts: up to 4,096 queries all are measured
_SPAN, _NUM_SPANS = 256, 16
# first counter of the choice of parts, which no draw shares
_STREAM = 0x5A3E


def sample_layer(
    call: CallInputs, ladder: Sequence[AttentionMethod], document: int, seed: int, num_parts: int = _NUM_SPANS
) -> Measurement:
    """Run every candidate once on evenly spaced parts of a layer's queries, which list the same keys as in the entire call.

    Args:
        call: the layer's inputs, and its output with exact attention, which no part has to compute again.
        ladder: the candidates, exact attention first.
        document: number of the document; the draws and the parts depend on it.
        seed: seed of the draws and of the parts.
        num_parts: number of parts; fewer take less time.

    Returns:
        errors and squared errors of all candidates, without times.
    """
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    whole = Problem(call.q, call.k, call.v, scale, causal=True, seed=seed + document, layer=call.layer)
    few = _parts(whole, num_parts)
    exact = (Exact().output(whole) if call.out is None else call.out).index_select(2, few.position).float()
    errors, squares, kv_heads = [], [], call.k.shape[1]
    for method in ladder:
        out = exact if isinstance(method, Exact) else method.output(few).float()
        errors.append(head_errors(out, exact, kv_heads))
        squares.append(_squares(out, exact, kv_heads))
    shape = (call.q.shape[1], kv_heads, call.q.shape[-1], call.v.shape[-1])
    return Measurement(document, call.layer, shape, (), tuple(errors), tuple(squares))


def _parts(whole: Problem, num_parts: int) -> Problem:
    """Take one part of each of equally many queries, all from the same random place on; everything if there are few."""
    each = whole.num_queries // _SPAN // num_parts
    if each < 2:
        return whole
    start = min(int(uniform((_STREAM, whole.seed, whole.layer), "cpu") * each), each - 1)
    return whole.of_spans(start * _SPAN, _SPAN, each * _SPAN)


def _squares(out: Tensor, exact: Tensor, kv_heads: int) -> tuple[float, ...]:
    miss, size = (x.double().square().sum((0, 2, 3)).unflatten(0, (kv_heads, -1)).sum(1) for x in (out - exact, exact))
    return tuple((miss / size.clamp(min=torch.finfo(size.dtype).tiny)).tolist())
