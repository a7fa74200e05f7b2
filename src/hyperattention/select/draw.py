"""Draw a few of the keys that are left, and weight them so that they stand for all of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.random import uniform
from hyperattention.select.score.pooling import chunks, edges
from hyperattention.select.stage import LookAhead, Stage, Taken
from hyperattention.tiling import Tiles
from hyperattention.types import Runs


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
        """Tell the probability of each key in a single draw: ``[lists, chunk, slots]``; 0 for keys never drawn."""


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
    def prepare(self, tiles: Tiles, taken: Taken, num: int) -> Callable[[slice], Distribution]:
        """Do what is done once for all tiles.

        Args:
            tiles: the tiled problem.
            taken: keys of earlier stages; only keys inside `taken.bounds` may be drawn.
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
        return (1.0 / self.count.clamp(min=1)).expand(index.shape)


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

    def prepare(self, tiles: Tiles, taken: Taken, num: int) -> Callable[[slice], Distribution]:
        """Delimit what is left of every tile."""
        left = edges(tiles, taken)
        return lambda part: Even((left[0][:, part], left[1][:, part], left[2][:, part], left[3][:, part]))


@dataclass(frozen=True)
class Draw(Stage):
    """Sample `num` of the keys that are left for each tile; the weights make numerator and denominator unbiased.

    One point falls in each of equal strata of a density's distribution function, so that a key's expected number of
    listings is num * p_j, and its log-weight is -log(num * p_j). Where no more than `num` keys are left, all are listed,
    with weight 0. Draws that fall on a chosen block count as zero: the block is exact already.

    Source: Han et al., 2023 (arXiv:2310.05869), Alg. 2 and 3.   Differs: stratified, and one sample serves both sums.
    Cost: `num` slots a query, and the density's products.   Guarantee: E[sum of weights of a key] = 1 for every key left.

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

    @property
    def reads_keys(self) -> bool:
        """Whether any part of the density does."""
        return any(density.reads_keys for density, _ in self.by.components)

    @property
    def reads_values(self) -> bool:
        """Whether any part of the density does."""
        return any(density.reads_values for density, _ in self.by.components)

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile."""
        return self.num

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count query-key products spent on the density, per query."""
        return sum(density.selection_pairs(num_keys, tile, head_dim, causal, num) for density, num in self._shares())

    def select(self, tiles: Tiles, taken: Taken) -> tuple[tuple[Runs, ...], Taken]:
        """Draw keys, or list them all where they are few."""
        problem = tiles.problem
        if not problem.k.shape[0] * problem.num_keys * len(tiles.index):
            return (), taken
        left = edges(tiles, taken)
        parts = self._components(tiles, taken)
        numbers = sum(density.numbers(tiles) for density, _ in self.by.components) + 8 * self.num
        seams = [seam for density, num in self._shares() for seam in density.seams(tiles, num)]
        drawn = [self._few(_drawn(parts, part), left, tiles, taken, part) for part in chunks(tiles, numbers, seams)]
        index, weight = (torch.cat(x, 1) for x in zip(*drawn, strict=True))
        if taken.blocks:
            weight = weight.masked_fill(taken.holds(index), -torch.inf)
        runs = Runs(
            first=index,
            size=1,
            log_weight=weight,
            low=left[0][..., 0],
            high=left[3][..., 0],
            causal=problem.causal and taken.gap is None,
            labelled=taken.labels is not None,
        )
        return (runs,), taken

    def _few(
        self, drawn: tuple[Tensor, Tensor], left: tuple[Tensor, ...], tiles: Tiles, taken: Taken, part: slice
    ) -> tuple[Tensor, Tensor]:
        """List all keys, with weight one, for the tiles of a chunk that have no more than are drawn.

        Returns:
            keys and log-weights, those drawn overwritten.
        """
        index, weight = drawn
        until = min(part.stop, tiles.within(self.num + taken.placed)) - part.start
        if until > 0:
            begin, hole_begin, hole_end, end = (x[:, part.start : part.start + until] for x in left)
            even, slot = Even((begin, hole_begin, hole_end, end)), torch.arange(self.num, device=index.device)
            few = even.count <= self.num
            listed = torch.where(slot < even.count, 0.0, -torch.inf)
            index[:, :until] = torch.where(few, even.at((slot + 0.5) / even.count.clamp(min=1)), index[:, :until])
            weight[:, :until] = torch.where(few, listed, weight[:, :until])
        return index, weight

    def _shares(self) -> list[tuple[Density, int]]:
        """Share the draws out; the last component reaches every key, and takes what rounding leaves, at least one draw."""
        shares, left = [], self.num
        *others, (last, _) = self.by.components
        for density, share in others:
            num = min(round(share * self.num), left - 1)
            if num:
                shares.append((density, num))
                left -= num
        return [*shares, (last, left)]

    def _components(self, tiles: Tiles, taken: Taken) -> list[tuple[Tensor, Callable[[slice], Distribution]]]:
        """Prepare the components.

        Returns:
            for each its points of the unit interval, ``[lists, tiles, slots]``, and a law for each chunk.
        """
        problem, device, parts, begun = tiles.problem, tiles.problem.device, [], 0
        head = torch.arange(problem.k.shape[1], device=device)[:, None, None]
        for density, num in self._shares():
            slot = torch.arange(num, device=device)
            counter = begun + (slot[:1] if density.evenly else slot)
            noise = uniform((problem.seed, problem.layer, head, tiles.index[:, None], counter), device)
            points = ((slot + noise) / num).repeat(problem.k.shape[0], 1, 1)
            parts.append((points, density.prepare(tiles, taken, num)))
            begun += num
        return parts


def _drawn(parts: list[tuple[Tensor, Callable[[slice], Distribution]]], part: slice) -> tuple[Tensor, Tensor]:
    """Draw for a chunk of tiles: keys, and their log-weights, ``[lists, chunk, slots]``."""
    laws = [(points[:, part], law(part)) for points, law in parts]
    index, own = (torch.cat(x, 2) for x in zip(*(law.draw(points) for points, law in laws), strict=True))
    if len(laws) == 1:
        listings = own * index.shape[2]
    else:
        listings = torch.zeros(index.shape, dtype=torch.float32, device=index.device)
        for points, law in laws:
            listings += points.shape[2] * law.share(index)
    # a law with nothing to draw from (no whole block, no finite score) drew keys to which it gives no chance: empty slots
    return index, (-listings.log()).masked_fill(own == 0, -torch.inf)
