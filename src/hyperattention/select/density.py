"""Densities, the distributions of draws over the remaining keys: the base class, and the uniform density."""

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
    """The distribution of draws over the remaining keys."""

    @property
    def looks_ahead(self) -> LookAhead:
        """How far beyond a row the row's draws may depend on queries or keys."""
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
        """Densities and their shares of the draws: this one alone, unless another must be mixed in to reach every key."""
        return ((self, 1.0),)

    @property
    def evenly(self) -> bool:
        """Whether points are evenly spaced from one random offset per tile; if not, one point is drawn in each stratum."""
        return False

    @abstractmethod
    def prepare(self, tiles: Tiles, covered: CoveredKeys, num: int) -> Callable[[slice], Distribution]:
        """Compute once what all tiles share.

        Args:
            tiles: the tiled problem.
            covered: keys of earlier stages; only keys inside `covered.bounds` may be drawn.
            num: number of draws of each tile.

        Returns:
            a function from a chunk of tiles to its distribution.
        """

    def write(self, tiles: Tiles, covered: CoveredKeys, num: int, results: tuple[Tensor, Tensor]) -> bool:
        """Draw from this density alone in kernels, and list all keys where no more are left than draws.

        Args:
            tiles: the tiled problem.
            covered: keys of earlier stages.
            num: number of draws of each tile.
            results: keys and log-weights, to be written, ``[lists, tiles, num]``.

        Returns:
            whether kernels did; if not, `prepare` and the distributions do it.
        """
        return False

    def seams(self, tiles: Tiles, num: int) -> list[int]:
        """Return the tile numbers, in this call, at which the way of drawing changes: no chunk has tiles of both sides."""
        return []

    def numbers(self, tiles: Tiles) -> int:
        """Count the float32 numbers held for each list and tile while drawing."""
        return 1

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool, num: int) -> float:
        """Count query-key products spent on `num` draws, per query."""
        return 0.0


@dataclass(frozen=True)
class Even(Distribution):
    """The same probability for every remaining key; see `pooling.edges` for the edges."""

    left: tuple[Tensor, Tensor, Tensor, Tensor]

    @property
    def count(self) -> Tensor:
        """Number of remaining keys: ``[lists, chunk, 1]``."""
        begin, hole_begin, hole_end, end = self.left
        return hole_begin - begin + end - hole_end

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the key at the fraction `point` of the remaining keys, with its probability."""
        return self.at(point), self.share(point)

    def at(self, point: Tensor) -> Tensor:
        """Return the key at the fraction `point` of the remaining keys."""
        begin, hole_begin, hole_end, _ = self.left
        place = torch.minimum((point * self.count).long(), (self.count - 1).clamp(min=0)) + begin
        return torch.where(place >= hole_begin, place + hole_end - hole_begin, place)

    def share(self, index: Tensor) -> Tensor:
        """Return one divided by the number of remaining keys."""
        return (1.0 / self.count.clamp(min=1).float()).expand(index.shape)


@dataclass(frozen=True)
class Uniform(Density):
    """Draw every remaining key with the same probability.

    p_j = 1 / N
    Source: Han et al., 2023 (arXiv:2310.05869), Alg. 2.   Differs: stratified rather than independent draws.
    Cost: O(draws).   Guarantee: numerator and denominator unbiased.
    """

    @property
    def reads_keys(self) -> bool:
        """False: the probabilities depend only on position."""
        return False

    def prepare(self, tiles: Tiles, covered: CoveredKeys, num: int) -> Callable[[slice], Distribution]:
        """Find the edges of the remaining keys of every tile."""
        left = edges(tiles, covered)
        return lambda part: Even((left[0][:, part], left[1][:, part], left[2][:, part], left[3][:, part]))
