"""Draws in proportion to leverage scores: keys that stand out from all others are drawn more often."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hyperattention.select.density import Density, Distribution, Uniform
from hyperattention.select.score.by_mass import laws_of_mass
from hyperattention.select.stage import CoveredKeys, LookAhead
from hyperattention.sensitivity.leverage import leverage
from hyperattention.sensitivity.online import online_leverage
from hyperattention.tiling import Tiles


@dataclass(frozen=True)
class LeverageScore(Density):
    """Draw keys by leverage score, mixed with a uniform share: the same probabilities for all queries.

    p_j = mix / N + (1 - mix) tau_j / sum_l tau_l,   over the N remaining keys of the tile
    tau_j = x_j' (X'X + lambda I)^-1 x_j,   x_j = k_j - mean,   lambda = ridge * trace(X'X) / head_dim
    Source: Kannan et al., 2024 (arXiv:2410.05462), LevAttention, for weights |q . k|^2, and sampling by leverage scores,
    Drineas et al., 2006.   Differs: for softmax, for which the scores are a heuristic; a uniform share bounds the weights.
    Cost: two head_dim products per key, O(keys) memory, and a binary search per draw.
    Guarantee: numerator and denominator unbiased.

    Args:
        mix: share of the draws that is uniform, above 0 and at most 1; no weight exceeds N / (num * mix).
        ridge: strength of the ridge, relative to the mean square of the keys; positive if `online`.
        online: whether a key is scored by itself and the keys before it, not centred: no draw then looks beyond its tile.

    Raises:
        ValueError: if `mix` or `ridge` is outside its range.
    """

    mix: float = 0.3
    ridge: float = 1e-3
    online: bool = False

    def __post_init__(self) -> None:
        """Check mix and ridge."""
        if not 0 < self.mix <= 1:
            raise ValueError(
                f"LeverageScore(mix={self.mix!r}): mix must be above 0 and at most 1; without a uniform share a key of "
                "leverage 0 would never be drawn, although it counts in every denominator"
            )
        if not self.ridge >= 0 or (self.online and not self.ridge > 0):
            raise ValueError(
                f"LeverageScore(ridge={self.ridge!r}): it must not be negative, and must be positive with online"
            )

    @property
    def looks_ahead(self) -> LookAhead:
        """All keys, or with `online` the keys of the tile."""
        return LookAhead.TILE if self.online else LookAhead.SEQUENCE

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool, num: int) -> float:
        """Count a Gram matrix and a factor: twice `head_dim` products of a key."""
        return 2.0 * head_dim

    @property
    def components(self) -> tuple[tuple[Density, float], ...]:
        """The scores, and uniform draws that reach every key."""
        return ((self, 1.0 - self.mix), (Uniform(), self.mix)) if self.mix < 1 else ((Uniform(), 1.0),)

    @torch.no_grad()
    def prepare(self, tiles: Tiles, covered: CoveredKeys, num: int) -> Callable[[slice], Distribution]:
        """Score all keys, and sum the scores along every list."""
        k, total = tiles.problem.k.flatten(0, 1), tiles.by_list(tiles.total)
        score = online_leverage(k, total, self.ridge) if self.online else leverage(k, total, self.ridge, centred=True)
        # keys that are not finite have score 0: the uniform share covers them
        return laws_of_mass(torch.nan_to_num(score, nan=0.0, posinf=0.0), tiles, covered)
