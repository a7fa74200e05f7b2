"""The attention function that transformers calls: approximate for the calls of the method, exact for all others."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hyperattention import ByHead, ByLayer, Exact, default_method
from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.integrations.transformers.cache_handle import READS_HELD, Handle, handle_of
from hyperattention.integrations.transformers.counts import CallCounter
from hyperattention.integrations.transformers.exact import ModelCall, run, run_exact
from hyperattention.integrations.transformers.masks import document_bounds, longest_span
from hyperattention.methods.base import AttentionMethod

ATTRIBUTE = "_hyperattention"
# the reason of a call that ran exactly only because the method is exact attention
EXACT_METHOD = "exact method"

# arguments of models that do not change the result, or that are read here
_NEUTRAL = frozenset(
    {
        *("position_ids", "cache_position", "use_cache", "return_dict", "num_items_in_batch", "seq_idx", "deterministic"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "sliding_window"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    }
)
# arguments that exact attention supports; all others are refused
_REASONS = MappingProxyType({"softcap": "softcap", "s_aux": "sinks", "position_bias": "position bias"})


@dataclass(frozen=True)
class ForwardSettings:
    """The settings that `use` attaches to a model's modules. Models share no state.

    Args:
        method: the method to run; None for the default method.
        layers: indices of the layers to approximate; None for all.
        min_length: smallest number of keys that is approximated.
        seed: seed of every random draw.
        counter: the counter of calls; None outside `use`.
        crossover: number of keys from which a plan is faster than exact attention; None if it never is.
    """

    method: AttentionMethod | None = None
    layers: frozenset[int] | None = None
    min_length: int = 0
    seed: int = 0
    counter: CallCounter | None = None
    crossover: int | None = 0

    def runs_exactly(self, layer: int) -> bool:
        """Return whether a layer's method is exact attention.

        Args:
            layer: the index of the layer.

        Returns:
            True if no head of the layer is approximated.
        """
        method = self.method.of(layer) if isinstance(self.method, ByLayer) else self.method
        methods = method.methods if isinstance(method, ByHead) else (method,)
        return all(isinstance(each, Exact) for each in methods)


def attention_forward(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads slots head_dim"],
    value: Float[Tensor, "batch kv_heads slots value_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch queries heads value_dim"], None]:
    """Compute one attention call of a model; the function registered in ``AttentionInterface``.

    Args:
        module: the attention module, to which `use` attached its settings.
        query: queries with positions applied.
        key: keys with positions applied, unwritten slots of a static cache included.
        value: values, unwritten slots of a static cache included.
        attention_mask: the mask from `build_mask`, or the user's own 4-D mask.
        scaling: factor of the scores; None for 1 / sqrt(head_dim).
        dropout: probability of dropping an attention weight.
        is_causal: whether later keys are hidden from a query; None to read it from the module.
        options: the model's further arguments.

    Returns:
        the output, and None in place of attention weights, which are not computed.
    """
    blocks = getattr(module, ATTRIBUTE, ())
    settings = blocks[-1].settings if blocks else ForwardSettings()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    extras = {name: option for name, option in options.items() if option is not None and name not in _NEUTRAL}
    _refuse_unknown(module, extras)
    handle = handle_of(key)
    rule = PLAIN if handle is None else handle.check(value, attention_mask, causal, extras, dropout)
    if handle is not None and not handle.store.is_whole:
        _refuse_packed(query, options)
        return _read_held(handle, settings, query, scaling, rule), None
    plain = ModelCall(module, query, key, value, causal, None, None, None, scaling, dropout, extras)
    call = _read_mask(plain, attention_mask, options)
    reason = _why_exact(call, settings, options.get("sliding_window"))
    if settings.counter is not None:
        settings.counter.record(reason)
    layer = getattr(module, "layer_idx", None) or 0
    out = run_exact(call) if reason is not None else run(call, settings.method, settings.seed, layer)
    if handle is not None:
        handle.end_step(query, query.shape[3] ** -0.5 if scaling is None else scaling, rule)
    batch, num_heads, num_queries, _ = query.shape
    return out.transpose(1, 2).reshape(batch, num_queries, num_heads, -1).contiguous(), None


setattr(attention_forward, READS_HELD, True)


def _refuse_unknown(module: nn.Module, extras: Mapping[str, Any]) -> None:
    if unknown := sorted(extras.keys() - _REASONS.keys()):
        raise ValueError(
            f"{type(module).__name__} gives its attention the argument {', '.join(map(repr, unknown))}, which is not known "
            "here and may change the result: remove the argument, or use attn_implementation='sdpa' or 'eager'"
        )


def _refuse_packed(query: Tensor, options: Mapping[str, Any]) -> None:
    """Refuse documents packed into one row, because the document of a kept key is not stored."""
    if query.shape[2] <= 1:
        return
    bounds, positions = options.get("cu_seq_lens_q"), options.get("position_ids")
    if bounds is not None and bounds.numel() > 2:
        found = f"cu_seq_lens_q of {bounds.numel() - 1} documents"
    elif positions is not None and positions.ndim == 2 and bool((positions.diff(dim=-1) < 0).any()):
        found = f"position_ids of shape {tuple(positions.shape)} that start again"
    else:
        return
    raise ValueError(
        f"{found}, over a compressed cache that has dropped keys: give each document its own row, or its own cache"
    )


def _read_held(handle: Handle, settings: ForwardSettings, query: Tensor, scaling: float | None, rule: ScoreRule) -> Tensor:
    """Attend to a compressed cache with the weights of its keys."""
    out = handle.attend(query, query.shape[3] ** -0.5 if scaling is None else scaling, rule)
    if settings.counter is not None:
        settings.counter.record(None)
    return out.transpose(1, 2).contiguous()


def _read_mask(call: ModelCall, mask: Tensor | None, options: Mapping[str, Any]) -> ModelCall:
    batch, num_queries, num_keys = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    if mask is None:
        bounds = _given_bounds(call, options) or _restart_bounds(call, options.get("position_ids"))
        return call if bounds is None else _pack(call, bounds)
    if mask.ndim == 4:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"attention mask of shape {tuple(mask.shape)} and dtype {mask.dtype}: a 4-D mask is bool, True = attend, or "
                "floating point, added to the scores; convert it with .bool()"
            )
        if mask.dtype == torch.bool and mask.shape[1:3] == (1, 1) and num_queries > 1:
            return replace(call, causal=False, key_mask=mask[:, 0, 0, :num_keys].expand(batch, -1))
        return replace(call, causal=False, dense=mask)
    # 2-D masks come from `build_mask`: bool, or int32 for packed documents; a model's own int mask would be misread
    if mask.ndim != 2 or mask.dtype not in (torch.bool, torch.int32) or mask.shape[1] > num_keys:
        raise ValueError(
            f"attention mask of shape {tuple(mask.shape)} and dtype {mask.dtype} for {num_keys} keys: expected 2-D bool "
            "[batch, keys] or 4-D [batch, heads, queries, keys]; let the model build it from a 2-D mask of 0 and 1"
        )
    if mask.dtype != torch.bool and mask.shape[1] == num_queries == num_keys:
        bounds = document_bounds(mask)
        return _pack(call, _given_bounds(call, options) or (bounds, bounds), mask)
    return _slice_live(replace(call, causal=True), mask.bool())


def _slice_live(call: ModelCall, mask: Tensor) -> ModelCall:
    # a static cache returns all its slots; the width of the mask is the number of written slots
    live, num_keys = mask.shape[1], call.key.shape[2]
    if live == num_keys:
        return replace(call, key_mask=mask)
    key_mask = None if not torch.compiler.is_compiling() and bool(mask.all()) else mask
    return replace(call, key=call.key[:, :, :live], value=call.value[:, :, :live], key_mask=key_mask)


def _given_bounds(call: ModelCall, options: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    bounds_q, bounds_k = options.get("cu_seq_lens_q"), options.get("cu_seq_lens_k")
    return None if bounds_q is None or bounds_k is None or call.query.shape[0] != 1 else (bounds_q, bounds_k)


def _restart_bounds(call: ModelCall, position_ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
    # with an empty cache transformers does not detect packing, and a query would attend to the previous document
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    if position_ids is None or not call.causal or not 1 < num_queries == num_keys == position_ids.shape[-1]:
        return None
    if position_ids.ndim != 2 or torch.compiler.is_compiling():
        return None
    step = position_ids.diff(dim=-1)
    if not bool((step < 0).any()):
        return None
    documents = torch.nn.functional.pad((step < 1).cumsum(dim=-1), (1, 0)).expand(call.query.shape[0], -1)
    bounds = document_bounds(documents)
    return bounds, bounds


def _pack(call: ModelCall, bounds: tuple[Tensor, Tensor], documents: Tensor | None = None) -> ModelCall:
    batch = call.query.shape[0]
    if documents is not None and batch > 1 and call.extras.keys() - {"softcap", "s_aux"}:
        # the model's extra arguments have one entry for each batch row, so the rows cannot be joined
        same = documents[:, None, :, None] == documents[:, None, None, :]
        return replace(call, causal=False, dense=same.tril() if call.causal else same)
    joined = (x.transpose(0, 1).flatten(1, 2)[None] for x in (call.query, call.key, call.value))
    query, key, value = joined
    return replace(call, query=query, key=key, value=value, bounds=bounds)


def _why_exact(call: ModelCall, settings: ForwardSettings, window: int | None) -> str | None:
    # the longest packed document decides; shorter documents choose by their own lengths later
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    if call.bounds is not None:
        num_queries, num_keys = map(longest_span, call.bounds)
    layer = getattr(call.module, "layer_idx", None)
    asked = [_REASONS[name] for name in sorted(call.extras)]
    if num_queries <= 1:
        return "single query"
    if settings.layers is not None and layer not in settings.layers:
        return "layer not listed"
    if asked:
        return asked[0]
    if call.dropout > 0:
        return "dropout"
    if call.dense is not None:
        return "sliding window" if window is not None and window < num_keys else "dense mask"
    if num_keys < settings.min_length:
        return "below min_length"
    if settings.method is None:
        default = default_method(num_keys, num_queries=num_queries, device=call.key.device)
        return "below the crossover" if isinstance(default, Exact) else None
    if settings.crossover is None:
        return "the plan was not faster than exact attention"
    if num_keys < settings.crossover:
        return "below the plan's crossover"
    return EXACT_METHOD if settings.runs_exactly(layer or 0) else None
