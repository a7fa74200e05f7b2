"""Recording of a model's attention calls while it runs: their time, their measured error, or their inputs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hyperattention.error.audit import ErrorReport, audit
from hyperattention.integrations.transformers import CallCounter
from hyperattention.integrations.transformers.cache_handle import READS_HELD
from hyperattention.integrations.transformers.forward import EXACT_METHOD, attention_forward
from hyperattention.integrations.transformers.masks import build_mask
from hyperattention.methods.base import AttentionMethod

_NAME, _ATTRIBUTE = "hyperattention_watched", "_hyperattention_watch"


@dataclass(frozen=True)
class CallInputs:
    """The inputs of one attention call.

    Args:
        layer: index of the layer.
        q: queries, with positions applied.
        k: keys, with positions applied.
        v: values.
        scale: factor of the scores.
        out: what the call gave, ``[batch, heads, queries, value_dim]``; None where only the inputs are at hand.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    out: Tensor | None = None


@dataclass
class CallRecorder:
    """The recorded calls; the record grows while the model runs.

    Args:
        counter: the counter of the `use` block, which shows whether a call was approximated.
        method: the method of the `use` block.
        rows: rows of each approximated call to audit; 0 for no audit.
        seed: seed of the rows, which differ from layer to layer.
        keep: whether to keep the inputs of every call, and its output.
        on_call: called with the inputs of each call that a method other than exact attention could run, one call at a time,
            so that the inputs of a large model need not be in memory together.
    """

    counter: CallCounter
    method: AttentionMethod
    rows: int = 0
    seed: int = 0
    keep: bool = False
    on_call: Callable[[CallInputs], None] | None = None
    attention_seconds: float = 0.0
    audit_seconds: float = 0.0
    reports: list[ErrorReport] = field(default_factory=list)
    inputs: list[CallInputs] = field(default_factory=list)

    def call(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict) -> Tensor:
        """Run one attention call and record it.

        Args:
            module: the attention module.
            q: queries.
            k: keys.
            v: values.
            mask: the model's mask.
            options: the model's further arguments.

        Returns:
            the output, ``[batch, queries, heads, value_dim]``.
        """
        counts, began = self.counter.counts, time.perf_counter()
        out, _ = attention_forward(module, q, k, v, mask, **options)
        ended = time.perf_counter()
        self.attention_seconds += ended - began
        layer, scale = int(getattr(module, "layer_idx", None) or 0), options.get("scaling")
        if self.keep:
            self.inputs.append(CallInputs(layer, q.clone(), k.clone(), v.clone(), scale, out.transpose(1, 2).clone()))
        # the audit does not support a mask; documents without padding have no mask
        if self.rows and mask is None and self.counter.counts.approximated > counts.approximated:
            # layers draw their rows independently, so that their errors can be pooled
            self.reports.append(
                audit(
                    q,
                    k,
                    v,
                    out.transpose(1, 2),
                    rows=self.rows,
                    is_causal=True,
                    scale=scale,
                    causal_align="lower_right",
                    enable_gqa=q.shape[1] != k.shape[1],
                    seed=self.seed * 1009 + layer,
                    method=self.method,
                )
            )
        replaceable = self.counter.counts.exact.get(EXACT_METHOD, 0) > counts.exact.get(EXACT_METHOD, 0)
        if self.on_call is not None and mask is None and replaceable:
            self.on_call(CallInputs(layer, q, k, v, scale, out.transpose(1, 2)))
        self.audit_seconds += time.perf_counter() - ended
        return out


def _watched_forward(module: nn.Module, query, key, value, attention_mask, **options) -> tuple[Tensor, None]:
    watch: CallRecorder = getattr(module, _ATTRIBUTE)
    return watch.call(module, query, key, value, attention_mask, options), None


setattr(_watched_forward, READS_HELD, True)


@contextmanager
def watched(model: PreTrainedModel, watch: CallRecorder) -> Iterator[CallRecorder]:
    """Record every attention call inside a ``with`` block, which must be inside a block of `use`; `use` restores the model.

    Args:
        model: the model of the `use` block.
        watch: the recorder.

    Yields:
        the recorder.
    """
    AttentionInterface.register(_NAME, _watched_forward)
    AttentionMaskInterface.register(_NAME, build_mask)
    modules = list(model.modules())
    for module in modules:
        setattr(module, _ATTRIBUTE, watch)
    try:
        model.set_attn_implementation(_NAME)
        with torch.inference_mode():
            yield watch
    finally:
        for module in modules:
            module.__dict__.pop(_ATTRIBUTE, None)
