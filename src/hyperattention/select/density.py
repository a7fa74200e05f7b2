"""How draws are spread over the keys that are left: the contract of a density, and the even one."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.select.score.pooling import edges
from hyperattention.select.stage import CoveredKeys, LookAhead
from hyperattention.tiling import Tiles


class Distribution(ABC):
    """Probabilities of keys, for a chunk of tiles."""

    @abstractmethod
    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Find the key at which the distribution function passes each point of [0, 1), and the key's probability.

        Args:
            point: ``[lists, chunk, slots]``.

        Returns:
            keys and their probabilities in a single draw, of the same shape.
        """

    @abstractmethod
    def share(self, index: Tensor) -> Tensor:
        """Return the probability of each key in a single draw: ``[lists, chunk, slots]``; 0 for keys never drawn."""


class Density(ABC):
    """How draws are spread over the keys that are left."""

    @property
    def looks_ahead(self) -> LookAhead:
        """How far beyond a row its draws may depend on queries or keys."""
        return LookAhead.NOTHING

    @property
    def reads_keys(self) -> bool:
        """Whether the probabilities depend on keys."""
        return True

    @property
    def reads_values(self) -> bool:
        """Whether the probabilities depend on values."""
        return False

    @property
    def components(self) -> tuple[tuple["Density", float], ...]:
        """Densities and shares of the draws: itself alone, unless it must be mixed with another to reach every key."""
        return ((self, 1.0),)

    @property
    def evenly(self) -> bool:
        """Whether points are evenly spaced from one offset a tile, rather than drawn one by one in their strata."""
        return False

    @abstractmethod
    def prepare(self, tiles: Tiles, covered: CoveredKeys, num: int) -> Callable[[slice], Distribution]:
        """Do what is done once for all tiles.

        Args:
            tiles: the tiled problem.
            covered: keys of earlier stages; only keys inside `taken.bounds` may be drawn.
            num: draws that each tile will make.

        Returns:
            a function from a chunk of tiles to its distribution.
        """

    def seams(self, tiles: Tiles, num: int) -> list[int]:
        """Number the tiles, in this call, from which on `num` draws work otherwise: no chunk has tiles of both sides."""
        return []

    def numbers(self, tiles: Tiles) -> int:
        """Count the float32 numbers held for each list and tile while drawing."""
        return 1

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool, num: int) -> float:
        """Count query-key products spent on `num` draws, per query."""
        return 0.0


@dataclass(frozen=True)
class Even(Distribution):
    """The same probability for every key that is left; see `pooling.edges` for the edges."""

    left: tuple[Tensor, Tensor, Tensor, Tensor]

    @property
    def count(self) -> Tensor:
        """Keys left: ``[lists, chunk, 1]``."""
        begin, hole_begin, hole_end, end = self.left
        return hole_begin - begin + end - hole_end

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Take the key at a share `point` of the way through those that are left."""
        return self.at(point), self.share(point)

    def at(self, point: Tensor) -> Tensor:
        """Find the key at a share `point` of the way through those that are left."""
        begin, hole_begin, hole_end, _ = self.left
        place = torch.minimum((point * self.count).long(), (self.count - 1).clamp(min=0)) + begin
        return torch.where(place >= hole_begin, place + hole_end - hole_begin, place)

    def share(self, index: Tensor) -> Tensor:
        """One in the number of keys left."""
        return (1.0 / self.count.clamp(min=1).float()).expand(index.shape)


@dataclass(frozen=True)
class Uniform(Density):
    """Draw every key that is left with the same probability.

    p_j = 1 / N
    Source: Han et al., 2023 (arXiv:2310.05869), Alg. 2.   Differs: stratified rather than independent draws.
    Cost: O(draws).   Guarantee: numerator and denominator unbiased.
    """

    @property
    def reads_keys(self) -> bool:
        """Position alone decides."""
        return False

    def prepare(self, tiles: Tiles, covered: CoveredKeys, num: int) -> Callable[[slice], Distribution]:
        """Delimit what is left of every tile."""
        left = edges(tiles, covered)
        return lambda part: Even((left[0][:, part], left[1][:, part], left[2][:, part], left[3][:, part]))
