"""One attention call, as a model makes it, that any method can be asked to answer."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hyperattention.attention import attention
from hyperattention.bench.candidates import Candidate


@dataclass(frozen=True)
class BenchCall:
    """One causal attention call that all methods answer.

    Args:
        q: queries.
        k: keys, as many as queries.
        v: values.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.
        layer: layer of a model, a counter of every draw.
        seed: of draws and of the rows audited; calls of another document or other inputs have another.
    """

    q: Float[Tensor, "1 heads queries head_dim"]
    k: Float[Tensor, "1 kv_heads keys head_dim"]
    v: Float[Tensor, "1 kv_heads keys value_dim"]
    scale: float | None = None
    layer: int = 0
    seed: int = 0

    @property
    def described(self) -> dict[str, object]:
        """Seed, layer and shapes, for records."""
        return {"seed": self.seed, "layer": self.layer, "q": tuple(self.q.shape), "k": tuple(self.k.shape)}

    def answer(self, candidate: Candidate) -> Callable[[], Tensor]:
        """Bind a method to the call; exact attention is torch's own function, called directly."""
        q, k, v, shared = self.q, self.k, self.v, self.q.shape[1] != self.k.shape[1]
        if candidate.exact:
            return lambda: scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=shared)

        def attend() -> Tensor:
            return attention(
                q,
                k,
                v,
                is_causal=True,
                scale=self.scale,
                enable_gqa=shared,
                method=candidate.row.method,
                seed=self.seed,
                layer=self.layer,
            )

        return attend
