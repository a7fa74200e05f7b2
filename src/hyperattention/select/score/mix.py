"""A mixture of densities: one density may find heavy keys that another misses."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from hyperattention.check import instance
from hyperattention.select.density import Density, Distribution
from hyperattention.select.stage import CoveredKeys, LookAhead
from hyperattention.tiling import Tiles


@dataclass(frozen=True, init=False, repr=False)
class Mix(Density):
    """Split the draws among several densities; the weight of a key counts its expected listings in all of them.

    expected listings_j = sum_i num_i p_ij
    Source: Veach and Guibas, 1995, the balance heuristic.   Differs: nothing.
    Cost: the sum of its parts.   Guarantee: unbiased, if some part reaches every key.

    Args:
        *parts: densities and their shares; shares are relative.

    Raises:
        ValueError: if there is no part, or a share is not positive and finite.
        TypeError: if a part is no density.

    Example:
        >>> Mix((HierarchicalSearch(), 0.7), (BlockScore(4), 0.3))
    """

    parts: tuple[tuple[Density, float], ...]

    # as in `Method`: the parts are arguments by place
    def __init__(self, *parts: tuple[Density, float]) -> None:
        if not parts or any(not 0 < share < math.inf for _, share in parts):
            raise ValueError(f"Mix{parts}: give at least one (density, share), every share above 0 and finite")
        for density, _ in parts:
            instance("Mix", Density, "Uniform()", density=density)
        object.__setattr__(self, "parts", parts)

    def __repr__(self) -> str:
        return f"Mix({', '.join(map(repr, self.parts))})"

    @property
    def looks_ahead(self) -> LookAhead:
        """The farthest look-ahead of any part."""
        return max(density.looks_ahead for density, _ in self.parts)

    @property
    def components(self) -> tuple[tuple[Density, float], ...]:
        """The components of all parts."""
        total = sum(share for _, share in self.parts)
        return tuple((inner, a * b / total) for density, a in self.parts for inner, b in density.components)

    def prepare(self, tiles: Tiles, covered: CoveredKeys, num: int) -> Callable[[slice], Distribution]:
        """Raise NotImplementedError: the components of a mixture draw separately."""
        raise NotImplementedError("a Mix has no distribution of its own: prepare each of its components")
