"""Draws in proportion to a mass per key that all tiles share: by running sums, over the remaining keys of each tile."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.select.density import Distribution, Even
from hyperattention.select.score.mass import running_sum
from hyperattention.select.score.pooling import edges
from hyperattention.select.stage import CoveredKeys
from hyperattention.tiling import Tiles


@dataclass(frozen=True)
class ByMass(Distribution):
    """Probabilities in proportion to a mass per key, over the remaining keys; uniform if every mass is 0."""

    mass: Tensor  # [lists, keys]
    below: Tensor  # [lists, keys + 1], running sums from 0
    left: tuple[Tensor, Tensor, Tensor, Tensor]  # edges, [lists, chunk, 1]

    @property
    def _even(self) -> Even:
        return Even(self.left)

    def _sums(self) -> tuple[Tensor, ...]:
        return tuple(self.below.gather(1, edge[..., 0])[..., None] for edge in self.left)

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Find keys by the running sums, without the hole."""
        begin, hole_begin, hole_end, end = self.left
        at = self._sums()
        first, total = at[1] - at[0], at[1] - at[0] + at[3] - at[2]
        target = point * total
        before_hole = target < first
        target = torch.where(before_hole, at[0] + target, at[2] + target - first)
        found = torch.searchsorted(self.below[:, 1:].contiguous(), target.flatten(1), right=True).view_as(target)
        # rounding may move a draw over an edge
        low, high = torch.where(before_hole, begin, hole_end), torch.where(before_hole, hole_begin, end)
        found = torch.minimum(torch.maximum(found, low), high - 1)
        index = torch.where(total > 0, found, self._even.at(point))
        return index, self.share(index)

    def share(self, index: Tensor) -> Tensor:
        """Return the mass of a key divided by the sum over the remaining keys; uniform if every mass is 0."""
        at = self._sums()
        total = at[1] - at[0] + at[3] - at[2]
        drawn = self.mass.gather(1, index.clamp(0, self.mass.shape[1] - 1).flatten(1)).view(index.shape)
        by_mass = drawn / total.clamp(min=torch.finfo(drawn.dtype).tiny)
        return torch.where(total > 0, by_mass, self._even.share(index))


def laws_of_mass(mass: Tensor, tiles: Tiles, covered: CoveredKeys) -> Callable[[slice], ByMass]:
    """Sum a mass per key once, for the distributions of all tiles.

    Args:
        mass: ``[lists, keys]``, not negative and finite; float64, because sums over long prefixes are large.
        tiles: the tiled problem.
        covered: keys of earlier stages.

    Returns:
        a function from a chunk of tiles to its distribution.
    """
    left = edges(tiles, covered)
    below = pad(running_sum(mass), (1, 0))  # [lists, keys + 1]
    return lambda part: ByMass(mass, below, (left[0][:, part], left[1][:, part], left[2][:, part], left[3][:, part]))
