"""Draw a few of the remaining keys, with weights so that they represent all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hyperattention.check import instance, positive
from hyperattention.random import uniform
from hyperattention.select.density import Density, Distribution, Even, Uniform
from hyperattention.select.score.pooling import chunks, edges, edges_of
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage
from hyperattention.tiling import Tiles
from hyperattention.types import DrawnSlots, Runs


@dataclass(frozen=True)
class Draw(Stage):
    """Sample `num` of the remaining keys for each tile; the weights make numerator and denominator unbiased.

    One point is drawn in each of `num` equal strata of a density's distribution function. So a key's expected number of
    listings is num * p_j, and its log-weight is -log(num * p_j). If at most `num` keys remain, all are listed, with
    log-weight 0. Draws inside a block of an earlier stage count as zero, because that block is already exact.

    Source: Han et al., 2023 (arXiv:2310.05869), Alg. 2 and 3.   Differs: stratified, and one sample serves both sums.
    Cost: `num` slots per query, and the density's products.
    Guarantee: E[sum of weights of a key] = 1 for every remaining key.

    Args:
        num: number of keys drawn for each tile.
        by: the density.

    Raises:
        ValueError: if `num` is not positive.
        TypeError: if `by` is no density.
    """

    num: int
    by: Density = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        positive("Draw", num=self.num)
        instance("Draw", Density, "Uniform()", by=self.by)

    @property
    def complete(self) -> bool:
        """True: every remaining key has an expected weight of one."""
        return True

    @property
    def looks_ahead(self) -> LookAhead:
        """The look-ahead of the density."""
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

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Draw keys, or list all of them if they are few."""
        problem = tiles.problem
        if not problem.k.shape[0] * problem.num_keys * len(tiles.index):
            return (), covered
        numbers = sum(density.numbers(tiles) for density, _ in self.by.components) + 8 * self.num
        seams = [seam for density, num in self._shares() for seam in density.seams(tiles, num)]
        index, weight, listings = self._in_kernels(tiles, covered) or self._in_operators(
            tiles, covered, chunks(tiles, numbers, seams)
        )
        left = edges_of(tiles, covered)
        if covered.blocks:
            weight = weight.masked_fill(covered.holds(index), -torch.inf)
        runs = Runs(
            first=index,
            size=1,
            log_weight=weight,
            low=left.begin,
            high=left.end,
            causal=problem.causal and covered.gap is None,
            labelled=covered.labels is not None,
            sample=self._sample(listings),
        )
        return (runs,), covered

    def _in_kernels(self, tiles: Tiles, covered: CoveredKeys) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Draw where a single density has kernels for it: keys and log-weights, or None."""
        (density, num), *others = self._shares()
        if others or tiles.problem.q.dtype == torch.float64:
            return None
        index = tiles.index.new_empty((tiles.problem.k.shape[0] * tiles.problem.k.shape[1], len(tiles.index), num))
        results = index, index.new_empty(index.shape, dtype=torch.float32)
        return (*results, None) if density.write(tiles, covered, num, results) else None

    def _in_operators(
        self, tiles: Tiles, covered: CoveredKeys, parts: Sequence[slice]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw by operators of PyTorch: keys, log-weights, and listings if there are several densities."""
        left, components = edges(tiles, covered), self._components(tiles, covered)
        drawn = [self._few(_drawn(components, part), left, tiles, covered, part) for part in parts]
        index, weight, listings = (torch.cat(x, 1) for x in zip(*drawn, strict=True))
        return index, weight, listings if len(components) > 1 else None

    def _sample(self, listings: Tensor | None) -> DrawnSlots:
        shares = self._shares()
        return DrawnSlots(tuple(num for _, num in shares), tuple(density.evenly for density, _ in shares), listings)

    def _few(
        self, drawn: tuple[Tensor, Tensor, Tensor], left: tuple[Tensor, ...], tiles: Tiles, covered: CoveredKeys, part: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """List all keys, with weight one, for the tiles of a chunk that have at most `num` remaining keys.

        Returns:
            keys, log-weights and listings; for all other tiles, drawn keys overwrite the first two.
        """
        index, weight, listings = drawn
        until = min(part.stop, tiles.within(self.num + covered.placed)) - part.start
        if until > 0:
            begin, hole_begin, hole_end, end = (x[:, part.start : part.start + until] for x in left)
            even = Even((begin, hole_begin, hole_end, end))
            slot = torch.arange(self.num, dtype=torch.int64, device=index.device)
            few = even.count <= self.num
            listed = torch.zeros_like(weight[:, :until]).masked_fill_(slot >= even.count, -torch.inf)
            index[:, :until] = torch.where(few, even.at((slot.double() + 0.5) / even.count.clamp(min=1)), index[:, :until])
            weight[:, :until] = torch.where(few, listed, weight[:, :until])
        return index, weight, listings

    def _shares(self) -> list[tuple[Density, int]]:
        """Split the draws among components; the last one reaches every key and gets the remainder, at least one draw."""
        shares, left = [], self.num
        *others, (last, _) = self.by.components
        for density, share in others:
            num = min(round(share * self.num), left - 1)
            if num:
                shares.append((density, num))
                left -= num
        return [*shares, (last, left)]

    def _components(self, tiles: Tiles, covered: CoveredKeys) -> list[tuple[Tensor, Callable[[slice], Distribution]]]:
        """Prepare the components.

        Returns:
            for each component its points of the unit interval, ``[lists, tiles, slots]``, and a distribution for each chunk.
        """
        problem, device, parts, begun = tiles.problem, tiles.problem.device, [], 0
        head = problem.head_index[:, None, None]
        for density, num in self._shares():
            slot = torch.arange(num, dtype=torch.int64, device=device)
            counter = begun + (slot[:1] if density.evenly else slot)
            noise = uniform((problem.seed, problem.layer, head, tiles.index[:, None], counter), device)
            points = ((slot + noise) / num).repeat(problem.k.shape[0], 1, 1)
            parts.append((points, density.prepare(tiles, covered, num)))
            begun += num
        return parts


def _drawn(parts: list[tuple[Tensor, Callable[[slice], Distribution]]], part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Draw for a chunk of tiles: keys, log-weights, and expected listings of each key, ``[lists, chunk, slots]``."""
    laws = [(points[:, part], law(part)) for points, law in parts]
    drawn = [(*law.draw(points), points.shape[2]) for points, law in laws]
    index, own = torch.cat([x for x, _, _ in drawn], 2), torch.cat([share * num for _, share, num in drawn], 2)
    listings = own
    if len(laws) > 1:
        listings = torch.zeros(index.shape, dtype=torch.float32, device=index.device)
        for points, law in laws:
            listings += points.shape[2] * law.share(index)
    # a distribution without any key (no complete block, no finite score) drew keys of probability 0: these slots are empty
    return index, (-listings.log()).masked_fill(own == 0, -torch.inf), own
