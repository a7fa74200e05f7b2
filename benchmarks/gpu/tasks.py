"""What is attended to: structured and Gaussian inputs of any length, and the shape of a task."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from gpu.session import Plan
from hyperattention.methods.base import exact_pairs
from hyperattention.synthetic import gaussian, structured

KINDS = ("structured", "gaussian")


@dataclass(frozen=True)
class Tensors:
    """Queries, keys and values, what they are, and the gradient that comes back where one is taken."""

    kind: str
    note: str
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor | None = None

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def with_gradients(self, seed: int) -> "Tensors":
        q, k, v = (x.detach().clone().requires_grad_() for x in self.qkv)
        draws = torch.Generator(q.device).manual_seed(seed)
        grad_out = torch.randn(q.shape, generator=draws, device=q.device, dtype=q.dtype)
        return replace(self, q=q, k=k, v=v, grad_out=grad_out)


@dataclass(frozen=True)
class Task:
    """One attention call to be made by several candidates."""

    tensors: Tensors
    causal: bool = True
    causal_align: str = "upper_left"

    @property
    def backward(self) -> bool:
        return self.tensors.grad_out is not None

    @property
    def queries(self) -> int:
        return self.tensors.q.shape[2]

    @property
    def keys(self) -> int:
        return self.tensors.k.shape[2]

    @property
    def exact_pairs(self) -> float:
        # a last query alone sees every key
        return exact_pairs(self.keys, self.causal and self.queries == self.keys)

    @property
    def title(self) -> str:
        direction = "causal" if self.causal else "non-causal"
        if self.queries != self.keys:
            return f"decoding, batch {self.tensors.q.shape[0]}"
        return f"{direction} forward{' + backward' if self.backward else ''}"

    def shape(self) -> dict[str, object]:
        q, k = self.tensors.q, self.tensors.k
        return {
            "title": self.title, "batch": q.shape[0], "heads": q.shape[1], "kv_heads": k.shape[1], "queries": self.queries,
            "keys": self.keys, "head_dim": q.shape[3], "causal": self.causal, "backward": self.backward,
        }  # fmt: skip


@lru_cache(maxsize=len(KINDS))
def _all_heads(plan: Plan, kind: str) -> Tensors:
    return _make(plan, kind, plan.long, plan.heads, plan.kv_heads)


def _make(plan: Plan, kind: str, tokens: int, heads: int, kv_heads: int) -> Tensors:
    maker = {"structured": structured, "gaussian": gaussian}[kind]
    made = maker(
        tokens, heads=heads, kv_heads=kv_heads, head_dim=plan.head_dim, seed=plan.seed, device=plan.device, dtype=plan.dtype
    )
    return Tensors(kind, "all heads made", made.q, made.k, made.v)


def make_tensors(plan: Plan, kind: str, tokens: int) -> Tensors:
    """Give inputs of a length up to `plan.long`: a shorter text is the beginning of a longer one, so one is made for all."""
    whole = _all_heads(plan, kind)
    q, k, v = (x[:, :, :tokens].contiguous() for x in whole.qkv)
    return Tensors(kind, whole.note, q, k, v)


def make_long_tensors(plan: Plan, kind: str, tokens: int, kv_heads: int) -> Tensors:
    """Give inputs of any length for some kv heads: one is made, which takes seconds at a million tokens, and repeated."""
    group = plan.heads // plan.kv_heads
    one = _make(plan, kind, tokens, group, 1)
    note = f"one kv head with its {group} query heads made, held {kv_heads} times in memory; draws differ between copies"
    q, k, v = (x.repeat(1, kv_heads, 1, 1) if kv_heads > 1 else x for x in one.qkv)
    return Tensors(kind, note, q, k, v)


def make_decode_tensors(plan: Plan, kind: str, batch: int) -> Tensors:
    """Give one last query for each of several sequences, whose caches hold the same text in memory of their own."""
    one = _all_heads(plan, kind)
    q, k, v = (x.repeat(batch, 1, 1, 1) for x in (one.q[:, :, -1:], one.k, one.v))
    return Tensors(kind, f"one text, held {batch} times in memory", q, k, v)
