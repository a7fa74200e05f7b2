"""A learned sketch: two small networks in place of two random matrices."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hyperattention.features.polynomial_sketch import check_size

# vectors whose hidden numbers exist at once: memory that stays in the cache, and is used again, not asked for anew
_VECTORS = 512


class LearnedSketch(nn.Module):
    """Map vectors to features whose squared products are weights, by networks that are trained with the model.

    M(x) = sqrt(r) tanh(f(x) * g(x) / sqrt(r)),   f, g: twice (LayerNorm, Dense 8 r, gelu, Dense r), without bias
    Source: Kacham et al., 2024 (arXiv:2310.01655), PolySketchFormer, learned sketches, in the form and with the initial
    values of the published code.   Differs: nothing.
    Cost: 16 r (head_dim + 3 r) products for each vector.   Guarantee: (M(q) . M(k))^2 is not negative and at most r^4; which
    polynomial it is like, training decides.

    Args:
        head_dim: width of the vectors.
        size: r, the number of features.
        expansion: hidden width in units of r.
        levels: how many networks follow one another in each branch.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if a size is not a positive integer.
    """

    def __init__(
        self,
        head_dim: int,
        size: int = 32,
        *,
        expansion: int = 8,
        levels: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("head_dim", head_dim), ("size", size), ("expansion", expansion), ("levels", levels)):
            check_size("LearnedSketch", name, value)
        self.size = size
        widths = [head_dim] + [size] * (levels - 1)

        def branch() -> nn.Sequential:
            options = {"device": device, "dtype": dtype}
            return nn.Sequential(*(part for width in widths for part in _network(width, size, expansion, options)))

        self.left, self.right = branch(), branch()

    def forward(self, x: Float[Tensor, "*batch head_dim"]) -> Float[Tensor, "*batch features"]:
        """Sketch vectors, queries and keys alike, some hundred at a time."""
        rows = x.reshape(-1, x.shape[-1])
        return torch.cat([self._sketched(part) for part in rows.split(_VECTORS)]).view(*x.shape[:-1], self.size)

    def _sketched(self, rows: Tensor) -> Tensor:
        root = self.size**0.5
        return torch.tanh(self.left(rows) * self.right(rows) / root) * root

    def extra_repr(self) -> str:
        """Return the number of features."""
        return f"size={self.size}"


def _network(width: int, size: int, expansion: int, options: dict) -> list[nn.Module]:
    layers = [nn.Linear(a, b, bias=False, **options) for a, b in ((width, expansion * size), (expansion * size, size))]
    for layer in layers:
        # the initial values of the published code: variance 1 / inputs, where torch has a third of this
        nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
    return [nn.LayerNorm(width, **options), layers[0], nn.GELU(approximate="tanh"), layers[1]]
