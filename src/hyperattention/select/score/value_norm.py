"""Draws in proportion to the norm of the values: keys with large values affect the output more."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.select.density import Density, Distribution, Uniform
from hyperattention.select.score.by_mass import laws_of_mass
from hyperattention.select.stage import CoveredKeys, LookAhead
from hyperattention.tiling import Tiles


@dataclass(frozen=True)
class ValueNorm(Density):
    """Draw keys by the norm of their values, mixed with a uniform share: less variance if values differ in norm.

    p_j = mix / N + (1 - mix) ||v_j||^power / sum_l ||v_l||^power,   over the N remaining keys of the tile
    Source: Han et al., 2023 (arXiv:2310.05869), Alg. 3, power 2.   Differs: one sample serves the values and the normaliser,
    so a uniform share is mixed in: a key with a small value still counts in the denominator.
    Cost: one product per key, O(keys) memory, and a binary search per draw.   Guarantee: numerator and denominator unbiased.

    Args:
        power: exponent of the norm: 1 minimises the variance of the numerator for equal attention weights, 2 is the paper's.
        mix: share of the draws that is uniform, above 0 and at most 1; no weight exceeds N / (num * mix).

    Raises:
        ValueError: if `power` is not positive, or `mix` is outside its range.
    """

    power: int = 1
    mix: float = 0.3

    def __post_init__(self) -> None:
        """Check power and mix."""
        positive("ValueNorm", power=self.power)
        if not 0 < self.mix <= 1:
            raise ValueError(
                f"ValueNorm(mix={self.mix!r}): mix must be above 0 and at most 1; without a uniform share a key whose "
                "value is 0 would never be drawn, although it counts in every denominator"
            )

    @property
    def looks_ahead(self) -> LookAhead:
        """Without an earlier Window stage, the values of a tile change its draws."""
        return LookAhead.TILE

    @property
    def reads_keys(self) -> bool:
        """False: only values matter."""
        return False

    @property
    def reads_values(self) -> bool:
        """Their norms."""
        return True

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool, num: int) -> float:
        """Count one product of `head_dim` numbers per key."""
        return 1.0

    @property
    def components(self) -> tuple[tuple[Density, float], ...]:
        """The norms, and uniform draws that reach every key."""
        return ((self, 1.0 - self.mix), (Uniform(), self.mix)) if self.mix < 1 else ((Uniform(), 1.0),)

    def prepare(self, tiles: Tiles, covered: CoveredKeys, num: int) -> Callable[[slice], Distribution]:
        """Sum the norms along every list of keys."""
        return laws_of_mass(self._mass(tiles), tiles, covered)

    def _mass(self, tiles: Tiles) -> Tensor:
        """Return ||v_j||^power of every key, ``[lists, keys]``, in float64, because sums over long prefixes are large."""
        v = tiles.problem.v.flatten(0, 1)
        norm = torch.linalg.vector_norm(v, dim=-1, dtype=torch.promote_types(v.dtype, torch.float32))
        # values that are not finite are covered by the uniform share only: they would make the sums of later keys useless
        return torch.nan_to_num(norm.double() ** self.power, nan=0.0, posinf=0.0)
