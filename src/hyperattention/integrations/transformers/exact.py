"""Exact attention for the calls of a model that no method may approximate, with all extras of those calls."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hyperattention import Exact, attention, varlen_attention
from hyperattention.methods.base import AttentionMethod

# largest number of scores in memory at a time in `attend_by_rows`: 64 MiB in float32
_SCORES_AT_A_TIME = 2**24


@dataclass(frozen=True)
class ModelCall:
    """One attention call of a model, with its mask decoded into causality, key mask, documents or a dense mask.

    Args:
        module: the attention module.
        query: queries; the documents of a packed batch are concatenated in one row.
        key: live keys only.
        value: live values only.
        causal: whether later keys are hidden from a query; the last query has the position of the last key.
        key_mask: True = attend.
        bounds: cumulative lengths of packed documents, of queries and of keys.
        dense: a 4-D mask that replaces all other masks, boolean or added to the scores.
        scale: factor of the scores; None for 1 / sqrt(head_dim).
        dropout: probability of dropping an attention weight.
        extras: further arguments of the model that change the result.
    """

    module: nn.Module
    query: Float[Tensor, "batch heads queries head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    causal: bool
    key_mask: Bool[Tensor, "batch keys"] | None
    bounds: tuple[Tensor, Tensor] | None
    dense: Shaped[Tensor, "..."] | None
    scale: float | None
    dropout: float
    extras: Mapping[str, Any]

    @property
    def is_plain(self) -> bool:
        """Return whether SDPA's ``is_causal`` alone expresses the mask.

        Returns:
            True if SDPA needs no mask.
        """
        num_queries, num_keys = self.query.shape[2], self.key.shape[2]
        aligned = not self.causal or num_queries in (1, num_keys)
        return aligned and self.key_mask is None and self.bounds is None and self.dense is None


def run_exact(call: ModelCall) -> Float[Tensor, "batch heads queries value_dim"]:
    """Run exact attention for a call, with a dense mask only if nothing else can express the call.

    Args:
        call: the attention call of the model.

    Returns:
        the attention output.
    """
    if "softcap" in call.extras or "s_aux" in call.extras:
        return attend_by_rows(call)
    if call.is_plain or call.dense is not None or call.dropout > 0 or call.extras:
        mask = None if call.is_plain else visible_rows(call, 0, call.query.shape[2])
        out, _ = sdpa_attention_forward(
            call.module,
            call.query,
            call.key,
            call.value,
            mask,
            dropout=call.dropout,
            scaling=call.scale,
            is_causal=call.causal,
            **call.extras,
        )
        return out.transpose(1, 2)
    return run(call, Exact(), seed=0, layer=0)


def run(
    call: ModelCall, method: AttentionMethod | None, seed: int, layer: int
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Run a call through `attention`, or through `varlen_attention` for packed documents.

    Args:
        call: the attention call of the model.
        method: the method to run; None for the default method.
        seed: seed of every random draw.
        layer: index of the layer; the draws depend on it.

    Returns:
        the attention output.
    """
    num_heads, num_kv_heads = call.query.shape[1], call.key.shape[1]
    shared = {
        "is_causal": call.causal,
        "scale": call.scale,
        "enable_gqa": num_heads != num_kv_heads,
        "method": method,
        "seed": seed,
        "causal_align": "lower_right",
        "layer": layer,
    }
    if call.bounds is not None:
        return varlen_attention(call.query, call.key, call.value, *call.bounds, **shared)
    return attention(call.query, call.key, call.value, key_mask=call.key_mask, **shared)


def visible_rows(call: ModelCall, start: int, stop: int) -> Tensor | None:
    """Make a dense mask for some rows of a call.

    Args:
        call: the attention call.
        start: first query.
        stop: one past the last query.

    Returns:
        a mask that broadcasts to ``[batch, heads, stop - start, keys]``; None if every key is visible.
    """
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    if call.dense is not None:
        rows = call.dense if call.dense.shape[2] == 1 else call.dense[:, :, start:stop]
        return rows[..., :num_keys]
    queries = torch.arange(start, stop, dtype=torch.int64, device=call.key.device)[:, None]
    keys = torch.arange(num_keys, dtype=torch.int64, device=call.key.device)[None, :]
    if call.bounds is not None:
        ends = [bound[1:].long() for bound in call.bounds]
        documents = [torch.bucketize(i, end, right=True) for i, end in zip((queries, keys), ends, strict=True)]
        same = documents[0] == documents[1]
        # both are counted back from the end of their document, so its last query has the position of its last key
        lag = (keys - ends[1][documents[1]]) - (queries - ends[0][documents[0]])
        return (same & (lag <= 0) if call.causal else same)[None, None]
    mask = (keys <= queries + num_keys - num_queries)[None, None] if call.causal else None
    if call.key_mask is None:
        return mask
    live = call.key_mask[:, None, None, :]
    return live if mask is None else mask & live


def attend_by_rows(call: ModelCall) -> Float[Tensor, "batch heads queries value_dim"]:
    """Compute exact attention with capped scores or learned sinks, a slice of queries at a time; SDPA supports neither.

    score <- softcap * tanh(score / softcap), then softmax over the keys and one sink logit a head, whose share is dropped
    Source: the eager attention of Gemma 2 and gpt-oss.   Differs: in slices, so memory stays linear in the keys.

    Args:
        call: the attention call of the model; ``softcap`` and ``s_aux`` are read from its extras.

    Returns:
        the attention output.
    """
    batch, num_heads, num_queries, head_dim = call.query.shape
    num_kv_heads, num_keys = call.key.shape[1:3]
    grouped = call.query.unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    scale = head_dim**-0.5 if call.scale is None else call.scale
    size = max(1, _SCORES_AT_A_TIME // max(1, batch * num_heads * num_keys))
    outs = []
    for start in range(0, num_queries, size):
        rows = grouped[:, :, :, start : start + size]  # [batch, kv_heads, group, rows, head_dim]
        scores = (rows @ call.key[:, :, None].transpose(-1, -2) * scale).flatten(1, 2)  # [batch, heads, rows, keys]
        weights = _weigh(call, scores, start).to(call.value.dtype).unflatten(1, grouped.shape[1:3])
        outs.append((weights @ call.value[:, :, None]).flatten(1, 2))
    return torch.cat(outs, dim=2)


def _weigh(call: ModelCall, scores: Tensor, start: int) -> Tensor:
    softcap, sinks = call.extras.get("softcap"), call.extras.get("s_aux")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if "position_bias" in call.extras:
        bias = call.extras["position_bias"]
        scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, start : start + scores.shape[2]])
    mask = visible_rows(call, start, start + scores.shape[2])
    if mask is not None:
        # the smallest finite number, not -inf: a row without visible keys stays finite, as in the models' eager attention
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sinks = sinks.reshape(1, -1, 1, 1).to(scores.dtype).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(dim=-1, dtype=torch.float32)
    return torch.nn.functional.dropout(weights, call.dropout)
