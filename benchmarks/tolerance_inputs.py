"""Inputs of tolerance.py: calls of the reference model on held-out documents, and structured inputs of both kinds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hyperattention.attention import attention, measured_attention
from hyperattention.bench.rows import rows
from hyperattention.error.tolerance.report import ToleranceReport
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.exact import Exact
from hyperattention.reference.call_recorder import CallInputs
from hyperattention.reference.model import LoadedModel
from hyperattention.reference.passes import capture
from hyperattention.reference.samples import EvaluationSample
from hyperattention.synthetic import LOW_RANK, SCATTERED, structured

CAPTURED = "captured"
KINDS = {"scattered": SCATTERED, "low rank": LOW_RANK}
# a structured input: from diffuse to sharp, two query heads for each kv head
HEADS, KV_HEADS = 4, 2


@dataclass(frozen=True)
class Name:
    """What tells a case from all others.

    Args:
        inputs: "captured", or the kind of structured heads.
        number: number of the document, or seed of the inputs.
        length: tokens.
        layer: layer of the model; 0 for structured inputs.
        kv_head: kv head of that layer, which with its query heads is the case; 0 for structured inputs.
    """

    inputs: str
    number: int
    length: int
    layer: int = 0
    kv_head: int = 0


@dataclass(frozen=True)
class Inputs:
    """One call: its name, its tensors, what else attention is told, and its exact output if it is known."""

    name: Name
    tensors: tuple[Tensor, Tensor, Tensor]
    options: dict
    known: Tensor | None = None

    @cached_property
    def exact(self) -> Tensor:
        """Exact attention, computed once for all tolerances."""
        return self.attend(Exact()) if self.known is None else self.known

    def attend(self, method: AttentionMethod) -> Tensor:
        return attention(*self.tensors, is_causal=True, enable_gqa=True, method=method, **self.options)

    def within(self, tolerance: float) -> tuple[Tensor, ToleranceReport]:
        result = measured_attention(*self.tensors, is_causal=True, enable_gqa=True, tolerance=tolerance, **self.options)
        assert result.tolerance is not None  # it was given
        return result.out, result.tolerance

    def errors(self, out: Tensor) -> Tensor:
        """The mean relative error over all rows of each head."""
        return (torch.linalg.vector_norm(out - self.exact, dim=-1) / torch.linalg.vector_norm(self.exact, dim=-1)).mean(-1)

    def by_head(self, methods: tuple[AttentionMethod, ...]) -> Callable[[], object]:
        """Bind the methods run directly, heads of one together; exact heads by torch's own kernel, as within a call."""
        q, k, v = self.tensors
        group, parts = q.shape[1] // k.shape[1], []
        for method, heads in ByHead(methods).groups().items():
            members = [head * group + member for head in heads for member in range(group)]
            tensors = (q, k, v) if len(heads) == k.shape[1] else (q[:, members], k[:, heads], v[:, heads])
            parts.append((method, Inputs(self.name, tensors, self.options)))
        return lambda: [part.attend(method) for method, part in parts]


def structured_case(name: Name) -> Inputs:
    made = structured(name.length, heads=HEADS, kv_heads=KV_HEADS, kind=KINDS[name.inputs], seed=name.number)
    return Inputs(name, (made.q, made.k, made.v), {"seed": name.number})


def captured_names(loaded: LoadedModel, document: int, length: int) -> tuple[Name, ...]:
    """Name the cases of a document: every kv head of every layer."""
    config = loaded.model.config
    return tuple(
        Name(CAPTURED, document, length, layer, head)
        for layer in range(config.num_hidden_layers)
        for head in range(config.num_key_value_heads)
    )


def captured_cases(loaded: LoadedModel, sample: EvaluationSample, names: tuple[Name, ...]) -> Iterator[Inputs]:
    """Run the model once; its own outputs, which are exact attention's, judge all cases."""
    exact = next(row for row in rows() if row.name == "exact")
    calls = {call.layer: call for call in capture(loaded, sample, exact)}
    for name in names:
        yield _of_head(name, calls[name.layer])


def _of_head(name: Name, call: CallInputs) -> Inputs:
    assert call.out is not None  # the inputs were kept
    group, head = call.q.shape[1] // call.k.shape[1], name.kv_head
    own = slice(head * group, (head + 1) * group)
    # every case has its own rows: calls with equal seed and layer are certified on the same ones
    seed = (name.number * 64 + name.layer) * 64 + head
    tensors = call.q[:, own], call.k[:, head : head + 1], call.v[:, head : head + 1]
    options = {"seed": seed, "layer": name.layer, "scale": call.scale}
    return Inputs(name, tensors, options, call.out[:, own])
