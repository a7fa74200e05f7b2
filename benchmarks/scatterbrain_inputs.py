"""Inputs of scatterbrain.py: structured ones, and the reference model's own queries, keys and values; their errors."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hyperattention import AttentionMethod, Scatterbrain
from hyperattention.attention import attention
from hyperattention.bench.rows import rows
from hyperattention.exact import exact_attention, visible_keys
from hyperattention.problem import Problem
from hyperattention.reference.model import load_reference
from hyperattention.reference.passes import capture
from hyperattention.reference.samples import samples_of_documents
from hyperattention.reference.text import held_out_documents
from hyperattention.synthetic import structured


@dataclass(frozen=True)
class Call:
    """The inputs of one attention call, and what they come from."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    layer: int = 0

    def exact(self, factor: float, rows: int) -> tuple[Tensor, Tensor, float]:
        """Return some rows of the second half, their exact output, and their mean entropy in nats."""
        n = self.q.shape[2]
        index = torch.linspace(n // 2, n - 1, rows).long()
        visible = visible_keys(n, n, True, "upper_left", "cpu")
        assert visible is not None  # the call is causal
        scale = self.scale * factor
        part = exact_attention(self.q, self.k, self.v, scale=scale, visible=visible, row_index=index)
        # entropy = lse - the mean score, and the mean of keys gives the mean score
        mean = exact_attention(self.q, self.k, self.k, scale=scale, visible=visible, row_index=index).out
        entropy = part.lse - scale * (self.q[:, :, index] * mean).sum(-1)
        return index, part.out, float(entropy.mean())

    def error(self, method: AttentionMethod, factor: float, exact: tuple[Tensor, Tensor, float], seed: int) -> float:
        options = {"scale": self.scale * factor, "seed": seed, "layer": self.layer}
        out = attention(self.q, self.k, self.v, is_causal=True, enable_gqa=True, method=method, **options)[:, :, exact[0]]
        norm = torch.linalg.vector_norm
        return float((norm(out - exact[1], dim=-1) / norm(exact[1], dim=-1)).mean())

    def clamped(self, method: Scatterbrain, factor: float, seed: int) -> float:
        """Return the share of rows whose low-rank part was lost to rounding."""
        asked = Problem(self.q, self.k, self.v, self.scale * factor, causal=True, seed=seed, layer=self.layer)
        return float(method.attend_counted(asked)[1].sum()) / self.q[..., 0].numel()


@dataclass(frozen=True)
class Inputs:
    length: int

    @cached_property
    def model(self) -> tuple[Call, ...]:
        sample = samples_of_documents(held_out_documents(self.length, 1))[0]
        calls = capture(load_reference(), sample, next(row for row in rows() if row.name == "exact"))
        return tuple(Call(call.q, call.k, call.v, call.scale or call.q.shape[-1] ** -0.5, call.layer) for call in calls)

    @cached_property
    def structured(self) -> tuple[Call, ...]:
        made = structured(self.length, heads=8, kv_heads=2, seed=0)
        return (Call(made.q, made.k, made.v, made.q.shape[-1] ** -0.5),)

    def named(self) -> dict[str, tuple[Call, ...]]:
        return {"structured": self.structured, "reference model": self.model}


def exponents(call: Call) -> dict:
    """Return medians of scale ||q + k||^2 over pairs of tokens, and of the norms."""
    q, k = call.q.unflatten(1, (call.k.shape[1], -1)), call.k[:, :, None]
    leading = k[:, :, :, : 16 + 128].mean(3, keepdim=True)
    sides = {
        "as they are": (q, k),
        "keys centred by leading keys": (q, k - leading),
        "both centred by all": (q - q.mean(3, keepdim=True), k - k.mean(3, keepdim=True)),
    }
    every = slice(None, None, max(1, q.shape[3] // 128))
    found = {
        name: float((call.scale * (x[:, :, :, every, None] + y[:, :, :, None, every]).square().sum(-1)).median())
        for name, (x, y) in sides.items()
    }
    return {"exponent": found, "norms": [float(torch.linalg.vector_norm(x, dim=-1).median()) for x in (q, k, call.v)]}
