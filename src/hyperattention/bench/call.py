"""One attention call of a model, which any method can run."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hyperattention.attention import attention
from hyperattention.bench.candidates import Candidate


@dataclass(frozen=True)
class BenchCall:
    """One causal attention call that all methods run.

    Args:
        q: queries.
        k: keys, as many as queries.
        v: values.
        scale: factor of the scores; None for 1 / sqrt(head_dim).
        layer: layer of the model; every draw depends on it.
        seed: seed of draws and of the audited rows; each document, and each set of inputs, has its own seed.
    """

    q: Float[Tensor, "1 heads queries head_dim"]
    k: Float[Tensor, "1 kv_heads keys head_dim"]
    v: Float[Tensor, "1 kv_heads keys value_dim"]
    scale: float | None = None
    layer: int = 0
    seed: int = 0

    @property
    def described(self) -> dict[str, object]:
        """Seed, layer and shapes of the call, for records."""
        return {"seed": self.seed, "layer": self.layer, "q": tuple(self.q.shape), "k": tuple(self.k.shape)}

    def answer(self, candidate: Candidate) -> Callable[[], Tensor]:
        """Return a function that runs a method on the call; exact attention is a direct call of torch's function."""
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
