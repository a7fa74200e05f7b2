"""Draw keys by estimates of the weights they would get: the heavy ones always, the light ones now and then."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.select.draw import Density, Distribution, Uniform
from hyperattention.select.score.blocks import KeyBounds, KeySketch, in_panels
from hyperattention.select.score.mass import clipped, inverse, root_mean_square
from hyperattention.select.score.pooling import Coarse, any_left, edges, pool_queries, seen_keys
from hyperattention.select.stage import LookAhead, Taken
from hyperattention.tiling import Tiles


@dataclass(frozen=True)
class _Listed(Distribution):
    """Probabilities of some keys, in ascending order; all others are never drawn."""

    index: Tensor  # [lists, chunk, some]
    mass: Tensor  # [lists, chunk, some], summing to one

    def invert(self, point: Tensor) -> Tensor:
        """Walk along the running sum."""
        return self.index.gather(2, inverse(self.mass, point)[0])

    def share(self, index: Tensor) -> Tensor:
        """Look a key up among those listed."""
        at = torch.searchsorted(self.index, index.contiguous()).clamp(max=self.index.shape[2] - 1)
        return self.mass.gather(2, at).masked_fill(self.index.gather(2, at) != index, 0.0)


@dataclass(frozen=True)
class KeyScore(Density):
    """Draw keys in proportion to the root mean square of the weights that the tile's queries would give them.

    a_ij = softmax_j(U q_i . U k_j),   p_j ~ (sum_i a_ij^2)^(1/2),   U = principal directions of the first keys

    For an unbiased sum of weighted values of equal size this p has the least variance, were a_ij exact; it is estimated from
    `dim` numbers of every key inside the panels that a coarse choice passes on. A share of the draws stays uniform over all
    that is left, so that no weight exceeds keys / (share * draws) however wrong the estimate. Points are evenly spaced from
    one random offset a tile, so that a key whose expected listings reach one is listed for certain: finding the heavy
    entries and sampling the light ones is one draw.

    Source: Han et al., 2023 (arXiv:2310.05869), its idea; Hansen and Hurwitz, 1943, sampling in proportion to size; Madow,
    1949, evenly spaced points; Singhania et al., 2024 (arXiv:2406.02542), keys in their principal directions.
    Differs: estimates are normalised for every pooled query, so that a sharp query is heard beside a diffuse one.
    Cost: pooled queries times panels and keys passed on, in short products.   Guarantee: unbiased, whatever the estimate.

    Args:
        dim: numbers kept of each key.
        pooled: averaged queries of each tile and head.
        coarse: how many keys are scored one by one.
        uniform_share: share of the draws that is uniform.

    Raises:
        ValueError: if a count is not positive, or the share is not between 0 and 1.
    """

    dim: int = 32
    pooled: int = 32
    coarse: Coarse = field(default_factory=lambda: Coarse(96, 64))
    uniform_share: float = 0.2

    def __post_init__(self) -> None:
        positive("KeyScore", dim=self.dim, pooled=self.pooled)
        if not 0.0 < self.uniform_share < 1.0:
            raise ValueError(
                f"KeyScore(uniform_share={self.uniform_share}): it must lie between 0 and 1 to bound the weights"
            )

    @property
    def looks_ahead(self) -> LookAhead:
        """Draws of a tile depend on all of its queries."""
        return LookAhead.TILE

    @property
    def components(self) -> tuple[tuple[Density, float], ...]:
        """The estimate, and uniform draws that reach every key."""
        return ((self, 1.0 - self.uniform_share), (Uniform(), self.uniform_share))

    @property
    def evenly(self) -> bool:
        """Points are evenly spaced."""
        return True

    def numbers(self, tiles: Tiles) -> int:
        """Count the sketches gathered and the scores."""
        return self.coarse.keys * (self.dim + self.pooled * tiles.problem.group)

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count products of pooled queries with panels and keys, per query, in units of one full-length product."""
        visible = num_keys / (2 if causal else 1)
        products = self.coarse.products(visible) + min(visible, self.coarse.keys)
        return self.pooled / tile * products * min(self.dim, head_dim) / head_dim

    def prepare(self, tiles: Tiles, taken: Taken, num: int) -> Callable[[slice], Distribution]:
        """Project keys and pooled queries; scores of centred keys differ by a constant a query, which softmax ignores."""
        problem, left = tiles.problem, edges(tiles, taken)
        k = problem.k.flatten(0, 1)
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        # while no more keys than draws are left all are listed: those keys may serve as a sample of the rest
        head = k[:, :num]
        basis = KeySketch(self.dim).basis(head)
        query = pool_queries(tiles, self.pooled).to(k.dtype) @ (basis * problem.scale)[:, None]
        projected = k @ basis - head.mean(1, keepdim=True) @ basis
        summary = KeyBounds().summarise(projected, self.coarse.panel_size, 1)
        sketch = in_panels(projected, self.coarse.panel_size, 1).flatten(0, 1).flatten(1)

        def over(part: slice) -> Distribution:
            some = tuple(x[:, part] for x in left)
            panel = self._panels(query[:, part], summary, some, seen_keys(tiles, part))
            index, mass = self._mass(query[:, part], sketch, panel, some)
            return _Listed(index, clipped(mass, num))

        return over

    def _panels(self, query: Tensor, summary: tuple[Tensor, ...], left: tuple[Tensor, ...], seen: int) -> Tensor:
        """Choose panels by bounds on their keys' weights, ascending: ``[lists, chunk, panels]``."""
        panels = -(-seen // self.coarse.panel_size)
        if panels <= self.coarse.num:
            return torch.arange(panels, device=query.device).expand(*query.shape[:2], panels)
        score = KeyBounds().score(query.flatten(1, 2), tuple(x[:, :panels] for x in summary)).unflatten(1, query.shape[1:3])
        first = torch.arange(panels, device=query.device) * self.coarse.panel_size
        return self.coarse.choose(root_mean_square(score, any_left(first, self.coarse.panel_size, left)), left)

    def _mass(self, query: Tensor, sketch: Tensor, panel: Tensor, left: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Numbers of the keys in the panels, ascending, and their estimated weights."""
        size, lists = self.coarse.panel_size, len(panel)
        row = panel + torch.arange(lists, device=panel.device)[:, None, None] * (len(sketch) // lists)
        some = sketch.index_select(0, row.flatten()).view(lists * panel.shape[1], panel.shape[2] * size, -1)
        index = (panel[..., None] * size + torch.arange(size, device=panel.device)).flatten(2)
        score = torch.bmm(query.flatten(0, 1), some.transpose(1, 2)).unflatten(0, panel.shape[:2])
        begin, hole_begin, hole_end, end = left
        return index, root_mean_square(
            score, (index >= begin) & ((index < hole_begin) | (index >= hole_end)) & (index < end)
        )
