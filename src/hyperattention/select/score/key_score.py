"""Draw keys by estimates of the weights they would get: the heavy ones always, the light ones now and then."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.select.draw import Density, Uniform
from hyperattention.select.score.blocks import KeyBounds, KeySketch, in_panels
from hyperattention.select.score.pooling import Coarse, any_left, chunks, edges, pool_queries, seen_keys
from hyperattention.select.stage import LookAhead, Taken
from hyperattention.tiling import Tiles

# rounds in which probabilities above one draw's share are cut to it and the rest is given to the others
_CLIP_ROUNDS = 3


@dataclass(frozen=True)
class _Keys:
    """Keys as the score sees them, made once for all tiles."""

    sketch: Tensor  # [lists * panels, panel_size * dim]
    least: Tensor  # [lists, panels, 1, dim]
    greatest: Tensor  # [lists, panels, 1, dim]


@dataclass(frozen=True)
class KeyScore(Density):
    """Draw keys in proportion to the root mean square of the weights that the tile's queries would give them.

    a_ij = softmax_j(U q_i . U k_j),   p_j ~ (sum_i a_ij^2)^(1/2),   U = principal directions of the first keys

    For an unbiased sum of weighted values this p has the least variance, were a_ij exact; it is estimated from `dim` numbers
    of every key inside the panels that a coarse choice passes on. A share of the draws stays uniform over all that is left,
    so that no weight exceeds keys / (share * draws) however wrong the estimate. Points are evenly spaced from one random
    offset a tile, so that a key whose expected listings reach one is listed for certain: finding the heavy entries and
    sampling the light ones is one draw.

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
        ValueError: if a count is not positive, or the share is not in (0, 1).
    """

    dim: int = 32
    pooled: int = 32
    coarse: Coarse = field(default_factory=lambda: Coarse(16, 64))
    uniform_share: float = 0.2

    def __post_init__(self) -> None:
        positive("KeyScore", dim=self.dim, pooled=self.pooled)
        if not 0.0 < self.uniform_share < 1.0:
            raise ValueError(f"KeyScore(uniform_share={self.uniform_share}): it must lie between 0 and 1; without it no bound")

    @property
    def looks_ahead(self) -> LookAhead:
        """Draws of a tile depend on all of its queries."""
        return LookAhead.TILE

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count products of pooled queries with panels and keys, per query, in units of one full-length product."""
        visible = num_keys / (2 if causal else 1)
        products = self.coarse.products(visible) + min(visible, self.coarse.keys)
        return self.pooled / tile * products * min(self.dim, head_dim) / head_dim

    def draw(self, tiles: Tiles, taken: Taken, point: Tensor) -> tuple[Tensor, Tensor]:
        """Score the keys of the best panels, and draw by the scores and uniformly."""
        num = point.shape[-1]
        num_uniform = min(num, max(1, round(self.uniform_share * num)))
        uniform = _spread(point, num - num_uniform)
        index, log_share = Uniform().draw(tiles, taken, uniform)
        if num == num_uniform or not tiles.problem.num_keys or not len(tiles.index):
            return Uniform().draw(tiles, taken, point)
        query, keys = self._prepare(tiles, settled=num - num_uniform)
        left = edges(tiles, taken)
        drawn = [
            self._draw_part(tiles, (query[:, part], keys), (tuple(x[:, part] for x in left), part), index[:, part], point)
            for part in chunks(tiles, self.coarse.keys * (self.dim + 2 * query.shape[2]))
        ]
        scored, expected = (torch.cat(x, 1) for x in zip(*drawn, strict=True))
        share = expected + num_uniform * log_share[..., :1].exp()
        return torch.cat([scored, index], -1), (share / num).log()

    def _prepare(self, tiles: Tiles, settled: int) -> tuple[Tensor, _Keys]:
        """Project keys and pooled queries; scores of centred keys differ by a constant a query, which softmax ignores."""
        problem = tiles.problem
        k = problem.k.flatten(0, 1)
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        # while no more keys than draws are left all are listed: those keys may serve as a sample of the rest
        head = k[:, :settled]
        basis = KeySketch(self.dim).basis(head)
        query = pool_queries(tiles, self.pooled).to(k.dtype) @ (basis * problem.scale)[:, None]
        projected = (k - head.mean(1, keepdim=True)) @ basis
        least, greatest = KeyBounds().summarise(projected, self.coarse.panel_size, 1)
        sketch = in_panels(projected, self.coarse.panel_size, 1)
        return query, _Keys(sketch.flatten(0, 1).flatten(1), least, greatest)

    def _draw_part(
        self, tiles: Tiles, scored: tuple[Tensor, _Keys], place: tuple[tuple[Tensor, ...], slice], uniform: Tensor, point: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw for a chunk of tiles: keys, and the expected listings by score of them and of the uniform draws."""
        (query, keys), (left, part) = scored, place
        panel = self._panels(query, keys, left, seen_keys(tiles, part))
        index, mass = self._mass(query, keys, panel, left, tiles.problem.num_keys)
        num = point.shape[-1] - uniform.shape[-1]
        total = mass.sum(-1, keepdim=True)
        for _ in range(_CLIP_ROUNDS):
            mass = torch.minimum(mass, total / num)
            total = mass.sum(-1, keepdim=True)
        listings = mass * (num / total.clamp(min=torch.finfo(mass.dtype).tiny))
        # one offset a tile; the running sum is rescaled so that rounding never leaves a point beyond it
        offset = point[:, part, :1] * point.shape[-1] % 1.0
        target = (torch.arange(num, device=mass.device) + offset).to(mass.dtype)
        running = listings.cumsum(-1)
        target = target * (running[..., -1:] / num)
        at = torch.searchsorted(running, target.contiguous(), right=True).clamp(max=running.shape[-1] - 1)
        found = torch.searchsorted(index, uniform.contiguous()).clamp(max=index.shape[-1] - 1)
        known = index.gather(-1, found) == uniform
        expected = torch.cat([listings.gather(-1, at), listings.gather(-1, found) * known], -1)
        return index.gather(-1, at), expected

    def _panels(self, query: Tensor, keys: _Keys, left: tuple[Tensor, ...], seen: int) -> Tensor:
        """Choose panels by bounds on their keys' weights, ascending: ``[lists, chunk, panels]``."""
        panels = -(-seen // self.coarse.panel_size)
        if panels <= self.coarse.num:
            return torch.arange(panels, device=query.device).expand(*query.shape[:2], panels)
        bounds = keys.least[:, :panels], keys.greatest[:, :panels]
        score = KeyBounds().score(query.flatten(1, 2), bounds).unflatten(1, query.shape[1:3])
        first = torch.arange(panels, device=query.device) * self.coarse.panel_size
        allowed = any_left(first, self.coarse.panel_size, left)[:, :, None]
        weight = torch.softmax(score.masked_fill_(~allowed, -torch.inf), -1)
        return self.coarse.choose(torch.linalg.vector_norm(weight, dim=2), left)

    def _mass(
        self, query: Tensor, keys: _Keys, panel: Tensor, left: tuple[Tensor, ...], num_keys: int
    ) -> tuple[Tensor, Tensor]:
        """Numbers of the keys in the panels, ascending, and the root of the sum of squares of their estimated weights."""
        size, lists = self.coarse.panel_size, len(panel)
        row = panel + torch.arange(lists, device=panel.device)[:, None, None] * keys.least.shape[1]
        some = keys.sketch.index_select(0, row.flatten()).view(lists * panel.shape[1], panel.shape[2] * size, -1)
        index = (panel[..., None] * size + torch.arange(size, device=panel.device)).flatten(2)
        begin, hole_begin, hole_end, end = left
        there = (index >= begin) & ((index < hole_begin) | (index >= hole_end)) & (index < end) & (index < num_keys)
        score = torch.bmm(query.flatten(0, 1), some.transpose(1, 2)).unflatten(0, panel.shape[:2])  # [lists, chunk, pooled, keys]
        score.add_(torch.zeros(there.shape, dtype=score.dtype, device=score.device).masked_fill_(~there, -torch.inf)[:, :, None])
        mass = torch.linalg.vector_norm(torch.softmax(score, -1), dim=2)
        return index, torch.nan_to_num(mass, nan=0.0).masked_fill_(~there, 0.0)


def _spread(point: Tensor, skipped: int) -> Tensor:
    """Stretch the last strata of the unit interval over all of it."""
    num = point.shape[-1]
    return (point[..., skipped:] * num - skipped) / (num - skipped)
