"""One case of a benchmark: its inputs and its timed call."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hyperattention.attention import attention
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact
from hyperattention.synthetic import structured

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """The shapes and the kind of a call.

    Args:
        length: number of tokens: of queries and of keys.
        heads: number of query heads, from diffuse to sharp.
        kv_heads: number of key and value heads.
        head_dim: width of a head.
        causal: whether queries see only earlier keys.
        backward: whether the call also computes gradients of q, k and v.
        seed: seed of inputs and draws.
    """

    length: int
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    causal: bool = True
    backward: bool = False
    seed: int = 0

    @property
    def title(self) -> str:
        """The properties that differ between cases, in words."""
        parts = [
            "causal" if self.causal else "non-causal",
            "forward + backward" if self.backward else "forward",
            f"d={self.head_dim}",
            "1 head" if self.heads == 1 else f"{self.heads} heads on {self.kv_heads}",
        ]
        return ", ".join(parts)

    def structured_inputs(self) -> Inputs:
        """Make inputs with the statistics of real models, of the kind `SCATTERED`, for measurements of error."""
        made = structured(self.length, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, seed=self.seed)
        return self._with_gradients((made.q, made.k, made.v))

    def plain_inputs(self) -> Inputs:
        """Make inputs in place, so that no freed memory is left that the call could reuse."""
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (
            torch.arange(h * self.length * self.head_dim, dtype=torch.float32, device="cpu")
            .sin_()
            .view(1, h, self.length, self.head_dim)
            for h in sizes
        )
        return self._with_gradients((q, k, v))

    def _with_gradients(self, inputs: Inputs) -> Inputs:
        q, k, v = (x.requires_grad_(self.backward) for x in inputs)
        return q, k, v

    def call(self, method: AttentionMethod, inputs: Inputs) -> Callable[[], Tensor]:
        """Return a function that runs a method on inputs.

        Args:
            method: the method to run; exact attention is a direct call of torch's function.
            inputs: queries, keys and values.

        Returns:
            a function that returns the output.
        """

        def attend() -> Tensor:
            q, k, v = inputs
            shared = self.heads != self.kv_heads
            if isinstance(method, Exact):
                return scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=shared)
            return attention(q, k, v, is_causal=self.causal, enable_gqa=shared, method=method, seed=self.seed)

        def attend_and_return() -> Tensor:
            out = attend()
            torch.autograd.grad(out.sum(), inputs)
            return out.detach()

        return attend_and_return if self.backward else attend
