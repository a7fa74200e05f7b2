"""Draws in proportion to the size of the values: a key whose value is large matters more to the output."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.check import positive
from hyperattention.select.draw import Density, Uniform
from hyperattention.select.stage import LookAhead, Taken
from hyperattention.tiling import Tiles


@dataclass(frozen=True)
class ValueNorm(Density):
    """Draw keys by the norm of their value rows, mixed with a uniform share: less variance where values differ in size.

    p_j = mix / N + (1 - mix) ||v_j||^power / sum_l ||v_l||^power,   over the N keys left to the tile
    Source: Han et al., 2023 (arXiv:2310.05869), Alg. 3, power 2.   Differs: one sample serves the values and the normaliser,
    so a uniform share is mixed in: a key with a small value still counts in the denominator.
    Cost: one product a key, O(keys) memory, and a binary search a draw.   Guarantee: numerator and denominator unbiased.

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
                "value is 0 would never be drawn, though it counts in every denominator"
            )

    @property
    def looks_ahead(self) -> LookAhead:
        """Without a window before it, a tile's own values shift its draws."""
        return LookAhead.TILE

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """One product of `head_dim` numbers a key."""
        return 1.0

    def draw(self, tiles: Tiles, taken: Taken, point: Tensor) -> tuple[Tensor, Tensor]:
        """Spend the first `mix` of the unit interval on uniform draws and the rest on draws by norm."""
        if not tiles.problem.num_keys:
            return Uniform().draw(tiles, taken, point)
        mass = self._mass(tiles)
        below = pad(mass.cumsum(1), (1, 0))  # [lists, keys + 1]
        edges = [tiles.by_list(x) for x in taken.bounds(tiles)]
        at = [below.gather(1, edge)[..., None] for edge in edges]
        begin, hole_begin, hole_end, end = (edge[..., None] for edge in edges)
        first, total = at[1] - at[0], at[1] - at[0] + at[3] - at[2]
        # where every value is 0 there is nothing to prefer
        mix = torch.where(total > 0, self.mix, 1.0)
        is_uniform = point < mix
        by_uniform, log_uniform = Uniform().draw(tiles, taken, (point / mix).clamp(max=1 - 2.0**-33))
        target = (point - mix).clamp(min=0) / (1 - mix).clamp(min=torch.finfo(point.dtype).tiny) * total
        before_hole = target < first
        target = torch.where(before_hole, at[0] + target, at[2] + target - first)
        found = torch.searchsorted(below[:, 1:].contiguous(), target.flatten(1), right=True).view_as(target)
        # rounding may carry a draw over an edge
        low, high = torch.where(before_hole, begin, hole_end), torch.where(before_hole, hole_begin, end)
        found = torch.minimum(torch.maximum(found, low), high - 1)
        index = torch.where(is_uniform, by_uniform, found)
        drawn = mass.gather(1, index.clamp(0, mass.shape[1] - 1).flatten(1)).view_as(target)
        share = mix * log_uniform.double().exp() + (1 - mix) * drawn / total.clamp(min=torch.finfo(total.dtype).tiny)
        return index, share.log()

    def _mass(self, tiles: Tiles) -> Tensor:
        """||v_j||^power of every key, ``[lists, keys]``; in float64, so that sums over long prefixes keep small terms."""
        v = tiles.problem.v.flatten(0, 1)
        norm = torch.linalg.vector_norm(v, dim=-1, dtype=torch.promote_types(v.dtype, torch.float32))
        # values that are not finite are left to the uniform share: sums over them would tell later keys nothing
        return torch.nan_to_num(norm.double() ** self.power, nan=0.0, posinf=0.0)
