"""Draw a few of the keys that are left, and weight them so that they stand for all of them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.random import uniform
from hyperattention.select.stage import LookAhead, Stage, Taken
from hyperattention.tiling import Tiles
from hyperattention.types import Runs


class Density(ABC):
    """How draws are spread over the keys that are left."""

    @property
    def looks_ahead(self) -> LookAhead:
        """How far beyond a row its draws may depend on queries or keys."""
        return LookAhead.NOTHING

    @abstractmethod
    def draw(self, tiles: Tiles, taken: Taken, point: Tensor) -> tuple[Tensor, Tensor]:
        """Turn points of the unit interval into keys, by inverting the density's distribution function.

        Args:
            tiles: the tiled problem.
            taken: keys of earlier stages; only keys inside `taken.bounds` may be drawn.
            point: ``[lists, tiles, slots]`` in [0, 1).

        Returns:
            keys ``[lists, tiles, slots]``, and the log of each one's probability in a single draw.
        """

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count query-key products spent on the density, per query."""
        return 0.0


@dataclass(frozen=True)
class Uniform(Density):
    """Draw every key that is left with the same probability.

    p_j = 1 / N
    Source: Han et al., 2023 (arXiv:2310.05869), Alg. 2.   Differs: stratified rather than independent draws.
    Cost: O(draws).   Guarantee: numerator and denominator unbiased.
    """

    def draw(self, tiles: Tiles, taken: Taken, point: Tensor) -> tuple[Tensor, Tensor]:
        """Take the key at a share `point` of the way through those that are left."""
        begin, hole_begin, hole_end, end = (x[..., None] for x in taken.bounds(tiles))
        count = hole_begin - begin + end - hole_end  # [batch, tiles, 1]
        place = (point * tiles.by_list(count)).long()
        place = torch.minimum(place, tiles.by_list(count - 1)) + tiles.by_list(begin)
        skipped = tiles.by_list((hole_end - hole_begin))
        index = torch.where(place >= tiles.by_list(hole_begin), place + skipped, place)
        return index, -tiles.by_list(count).clamp(min=1).float().log().expand_as(index)


@dataclass(frozen=True)
class Draw(Stage):
    """Sample `num` of the keys that are left for each tile; the weights make numerator and denominator unbiased.

    One point falls in each of `num` equal strata of the density's distribution function, so that a key's expected number of
    listings is num * p_j, and its log-weight is -log(num * p_j). Where no more than `num` keys are left, all are listed,
    with weight 0. Draws that fall on a chosen block count as zero: the block is exact already.

    Source: Han et al., 2023 (arXiv:2310.05869), Alg. 2 and 3.   Differs: stratified, and one sample serves both sums.
    Cost: `num` slots a query.   Guarantee: E[sum of weights of a key] = 1 for every key left.

    Args:
        num: keys drawn for each tile.
        by: the density.

    Raises:
        ValueError: if `num` is not positive.
    """

    num: int
    by: Density = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        positive("Draw", num=self.num)

    @property
    def complete(self) -> bool:
        """Every key that is left has an expected weight of one."""
        return True

    @property
    def looks_ahead(self) -> LookAhead:
        """As far as the density does."""
        return self.by.looks_ahead

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile."""
        return self.num

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count query-key products spent on the density, per query."""
        return self.by.selection_pairs(num_keys, tile, head_dim, causal)

    def select(self, tiles: Tiles, taken: Taken) -> tuple[tuple[Runs, ...], Taken]:
        """Draw keys, or list them all where they are few."""
        problem, device = tiles.problem, tiles.problem.device
        slot = torch.arange(self.num, device=device)
        head = torch.arange(problem.k.shape[1], device=device)[:, None, None]
        noise = uniform((problem.seed, problem.layer, head, tiles.index[:, None], slot), device)  # [kv_heads, tiles, slots]
        point = ((slot + noise) / self.num).repeat(problem.k.shape[0], 1, 1)
        begin, hole_begin, hole_end, end = taken.bounds(tiles)
        count = tiles.by_list(hole_begin - begin + end - hole_end)[..., None]
        drawn, log_share = self.by.draw(tiles, taken, point)
        rest = Uniform().draw(tiles, taken, (slot + 0.5) / count.clamp(min=1))[0]
        few = count <= self.num
        index = torch.where(few, rest, drawn)
        weight = torch.where(few, 0.0, -(log_share + torch.log(torch.tensor(float(self.num), device=device))))
        empty = (few & (slot >= count)) | taken.holds(index)
        runs = Runs(
            first=index,
            size=1,
            log_weight=weight.float().masked_fill(empty, -torch.inf),
            low=tiles.by_list(begin),
            high=tiles.by_list(end),
            causal=problem.causal and taken.gap is None,
            labelled=taken.labels is not None,
        )
        return (runs,), taken
