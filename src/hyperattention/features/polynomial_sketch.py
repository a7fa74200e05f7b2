"""Random sketches of even powers of a product: few features, whose weights are never negative."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hyperattention.random import normal


@dataclass(frozen=True)
class PolynomialSketch:
    """Sketch (q . k)^p for even p, by the square of a sketch of half the degree.

    M_1(x) = x,   M_2m(x) = (S M_m(x)) * (T M'_m(x)) / sqrt(size),   S, T Gaussian, M_m and M'_m independent;
    phi(x) = M_(p/2)(x) (x) M_(p/2)(x),   phi(q) . phi(k) = (M(q) . M(k))^2 >= 0
    Source: Kacham et al., 2024 (arXiv:2310.01655), PolySketchFormer, Alg. 1 and 2, remembered and not opened again; Ahle et
    al., 2020 (arXiv:1909.01410), the recursion; the published code was read.   Differs: scaled so that
    E[M(q) . M(k)] = (q . k)^(p/2). The published code divides both Gaussian matrices by sqrt(size), so that its weights of
    degree 4 are size^2 times too small.
    Cost: p - 2 products with Gaussian matrices for each vector.   Guarantee: M(q) . M(k) is unbiased; its square is not, and
    is larger by the variance. With r = size,
    sum_ij ((M(q_i) . M(k_j))^2 - (q_i . k_j)^p)^2 <= eps^2 sum_ij ||q_i||^2p ||k_j||^2p with probability 1 - delta, for
    r of the order of p eps^-2 log(1/delta). The worst inputs that were found are vectors of one direction, where
    eps^2 = 16 (p - 2) / r is expected for large r: an eps of 0.5 at p = 4 needs r = 128. Vectors of many directions have an
    eps of a few times 1 / r.

    Args:
        degree: p, of which half must be a power of two: 2, 4, 8, 16. For 2, M(x) = x: nothing is sketched.
        size: features of M, any positive number; not used for degree 2.
        seed: seed of the matrices: layers that share it share their matrices.

    Raises:
        ValueError: if the degree or the size cannot be sketched.
    """

    degree: int = 4
    size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_degree("PolynomialSketch", self.degree)
        if self.degree // 2 & (self.degree // 2 - 1):
            raise ValueError(
                f"PolynomialSketch(degree={self.degree}): half of it, {self.degree // 2}, must be a power of two, because "
                "the sketch is built from two sketches of half its degree; use 2, 4, 8 or 16, or a learned sketch"
            )
        check_size("PolynomialSketch", "size", self.size)

    def features(self, head_dim: int) -> int:
        """Return the number of features of M for vectors of a width."""
        return head_dim if self.degree == 2 else self.size

    def draw(self, head_dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """Draw the Gaussian matrices, a pure function of the seed.

        Args:
            head_dim: width of the vectors.
            device: device of the matrices.

        Returns:
            for each level, from that of x on, ``[sketches, 2, width, size]`` in float64: S and T of every sketch of it.
        """
        levels, sketches, width = [], self.degree // 4, head_dim
        while sketches:
            number = torch.arange(sketches * 2 * width * self.size, dtype=torch.int64, device=device)
            drawn = normal((self.seed, len(levels), number), device)
            levels.append(drawn.view(sketches, 2, width, self.size) * self.size**-0.25)
            sketches, width = sketches // 2, self.size
        return tuple(levels)


def apply_sketch(x: Float[Tensor, "*batch head_dim"], matrices: tuple[Tensor, ...]) -> Float[Tensor, "*batch features"]:
    """Apply the sketch M of half the degree.

    Args:
        x: vectors.
        matrices: as drawn by `PolynomialSketch`, in the dtype of `x`; none leave `x` as it is.

    Returns:
        M(x).
    """
    if not matrices:
        return x
    # a vector for both inputs of every sketch of the first level
    parts = x[..., None, None, :].expand(*x.shape[:-1], *matrices[0].shape[:2], x.shape[-1])
    for level in matrices:
        sketched = torch.einsum("...srw,srwf->...srf", parts, level).prod(-2)  # [..., sketches, size]
        parts = sketched.unflatten(-2, (-1, 2)) if len(level) > 1 else sketched
    return parts.squeeze(-2)


class RandomSketch(nn.Module):
    """The sketch M of half the degree as a module: its matrices are saved with a model, and not trained.

    Args:
        sketch: the degree, the number of features and the seed.
        head_dim: width of the vectors.
        device: device of the matrices; None for the CPU.
        dtype: dtype of the matrices; None for float32.
    """

    def __init__(
        self,
        sketch: PolynomialSketch,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.size = sketch, sketch.features(head_dim)
        for number, level in enumerate(sketch.draw(head_dim, torch.device(device or "cpu"))):
            self.register_buffer(f"level_{number}", level.to(dtype or torch.float32))

    def forward(self, x: Float[Tensor, "*batch head_dim"]) -> Float[Tensor, "*batch features"]:
        """Sketch vectors, queries and keys alike."""
        return apply_sketch(x, tuple(self.buffers()))

    def extra_repr(self) -> str:
        """Return the settings."""
        return repr(self.settings)


def self_tensor(x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch squared"]:
    """Expand x to x (x) x, whose products are squares: phi(q) . phi(k) = (q . k)^2."""
    return (x[..., :, None] * x[..., None, :]).flatten(-2)


def check_degree(owner: str, degree: int) -> None:
    """Check that a degree is even and positive.

    Args:
        owner: the class that has it, for the message.
        degree: the degree.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 2 or degree % 2:
        raise ValueError(
            f"{owner}(degree={degree!r}): must be even and positive, because weights of odd degrees can be negative; use 4"
        )


def check_size(owner: str, name: str, size: int) -> None:
    """Check that a size is a positive integer.

    Args:
        owner: the class that has it, for the message.
        name: its name.
        size: the size.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{owner}({name}={size!r}): must be a positive integer")
