"""Draw for queries that look for similar keys, wherever in a tile they stand: each such list serves few and alike rows."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.kernels.backend import grid_holds, triton_reads
from hyperattention.kernels.choose.operator import scores_alike
from hyperattention.kernels.choose.operator_alike import parts_of
from hyperattention.random import uniform
from hyperattention.select.alike import AlikeTiles, first_directions, sort_alike
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.alike_fused import (
    FusedBlocks,
    FusedSort,
    fused_choice,
    fused_first,
    fused_metric,
    fused_plan,
)
from hyperattention.select.score.alike_scan import WIDER, AlikeScan, room_of
from hyperattention.select.score.block_sizes import OPENED, BlockSizes
from hyperattention.select.score.candidates import Candidates, draws_of
from hyperattention.select.score.key_blocks import KeyBlocks, blocks_of
from hyperattention.select.score.key_metric import KeyMetric
from hyperattention.select.score.pooling import chunks, edges, edges_of
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage, Tiling
from hyperattention.tiling import Tiles
from hyperattention.types import DrawnSlots, Runs, Selection

# float32 numbers held for each candidate and list of queries, and for each slot, while drawing
_NUMBERS, _SLOT_NUMBERS = 6, 12
# float32 numbers held for each number of a query while sorting, partly in float64
_SORT_NUMBERS = 9


@dataclass(frozen=True)
class DrawAlike(Stage):
    """Sample `num` of the keys that are left for each list of a tile, which queries that look for similar keys share.

    p_j ~ min(1 / num, |v_j - v| max_g n_g^(1/2) exp(q_g . k_j - z_g + 2 s_j)),   s_j^2 = sum_c var_c k_jc^2:   q_g is the
    average of n_g alike queries, s_j the deviation, over a list, of a score from its group's average, and v the mean of the
    first values.

    Rows of all heads of a group, out of one tile of positions, are sorted along the direction in which they differ most, cut
    into equal parts, and so on, down to lists; two rows differ by as much as their scores do over leading keys that all rows
    of the tile see (`KeyMetric`). Inside a list they are grouped around those that are farthest from one
    another, so that a query unlike all others is not averaged. A share of the draws is spread evenly, so that no weight
    exceeds keys / (share * draws) however wrong the estimate. Keys are scored one by one while a tile sees no more than
    `most` of them. Beyond that, blocks of 4, 16, 64, ... neighbouring keys are scored by their means and variances, no more
    than `most`; those of the largest shares are opened, down to keys, which are candidates for weighted draws, and all
    others share the even draws. z_g is the logarithm of the sum of closed blocks' exponentials, as if scores inside were
    normal, and of those of the keys in opened ones.
    On a GPU blocks are opened for those lists of a tile that a program holds: all of up to 8 of default size, which are
    those of 4 heads of a group; the lists of larger groups are cut into equal shares.

    Source: Han et al., 2023 (arXiv:2310.05869), its idea; Hansen and Hurwitz, 1943, sampling in proportion to size; Madow,
    1949, evenly spaced points; Derrida, 1981, sums of few large scores; Friedman et al., 1977, cuts at medians; Gonzalez,
    1985, centres far from one another; Roy et al., 2020 (arXiv:2003.05997), queries that
    share keys by their content. Differs: contents decide only who shares a draw, and estimates only what is drawn.
    Cost: `num` slots a query, and pooled / rows * (`most` + num * candidates) products at most while blocks have 4 keys;
    with larger ones, 2 num * candidates more for each size between 4 and these. Time grows with the length, not its square.
    Guarantee: numerator and denominator unbiased, whatever the estimate.

    Args:
        num: keys drawn for each list.
        rows: queries, of all heads of a group, that share a list; the fewer the better they are served, and the more is
            gathered. 64 fill the units of a GPU.
        pooled: averaged groups of each list.
        most: keys that a tile may see to be scored one by one, all of them; and blocks, where it sees more.
        uniform_share: share of the draws that is spread evenly.
        candidates: keys, for each draw, that are scored one by one where blocks are opened.

    Raises:
        ValueError: if a number is not positive, or the share is not between 0 and 1.
    """

    num: int
    rows: int = 64
    pooled: int = 8
    most: int = 8192
    uniform_share: float = 0.1
    candidates: int = 12

    def __post_init__(self) -> None:
        positive("DrawAlike", num=self.num, rows=self.rows, pooled=self.pooled, most=self.most, candidates=self.candidates)
        if not 0.0 < self.uniform_share < 1.0:
            raise ValueError(
                f"DrawAlike(uniform_share={self.uniform_share}): it must lie between 0 and 1 to bound the weights"
            )

    @property
    def complete(self) -> bool:
        """Every key that is left has an expected weight of one."""
        return True

    @property
    def reads_values(self) -> bool:
        """A key counts by how far its value lies from the others."""
        return True

    @property
    def looks_ahead(self) -> LookAhead:
        """Draws of a tile depend on all of its queries."""
        return LookAhead.TILE

    def check_after(self, earlier: tuple[Stage, ...]) -> None:
        """Refuse to follow anything but Sinks and Window.

        Args:
            earlier: the stages before this one.

        Raises:
            ValueError: if one of them takes other keys than ranges of positions.
        """
        for stage in earlier:
            if not isinstance(stage, Sinks | Window):
                raise ValueError(
                    f"{self!r} cannot follow {stage!r}: rows of its lists come from a whole tile, and only ranges of "
                    "positions are known to be taken from all of them; put it right after Sinks and Window"
                )

    def slots(self, tile: int) -> int:
        """Count the keys listed for each row."""
        return self.num

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count products of averages with blocks and keys, of lists' deviations, and of the variance inside blocks."""
        visible, many = num_keys / (2 if causal else 1), -(-tile // self.rows)
        blocks, keys = 0.0, 0.0
        # the mean over tiles, by the share of them whose first blocks have one size
        edge, size = 0, 1
        while edge < num_keys:
            until = min(num_keys, self.most * size)
            share, seen = ((until - edge) / num_keys, (edge + until) / 2) if causal else (float(until == num_keys), visible)
            blocks_of_tile, keys_of_tile = self._units(seen, size)
            blocks, keys = blocks + share * blocks_of_tile, keys + share * keys_of_tile
            edge, size = until, size * OPENED
        return ((blocks + keys) * (self.pooled + 1) * many + blocks) / tile

    def _units(self, seen: float, size: int) -> tuple[float, float]:
        """Count the blocks and the keys that are scored where a tile sees so many keys, in blocks of `size` at first."""
        blocks, units = 0.0, seen / size
        while size > 1:
            blocks, size = blocks + units, size // OPENED
            units = min(seen / size, 1.0 * self.num * self.candidates * (1 if size == 1 else WIDER))
        return blocks, units

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Take nothing in tiles of positions."""
        return (), covered

    def select_apart(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[tuple[Tiling, Selection], ...], CoveredKeys]:
        """Sort queries, score keys, and draw for each list, or list all keys where they are few."""
        problem = tiles.problem
        if not problem.k.shape[0] * problem.num_keys * problem.num_queries:
            return (), covered
        parts = self._parts(tiles)
        # rows of a list are of one part
        many = (parts or 1) * -(-tiles.size * (problem.group // (parts or 1)) // self.rows)
        shape = (problem.k.shape[0] * problem.k.shape[1], len(tiles.index) * many, self.num)
        index = torch.empty(shape, dtype=torch.int64, device=problem.device)
        weight = torch.empty(shape, dtype=torch.promote_types(problem.q.dtype, torch.float32), device=problem.device)
        drawn = index, weight
        if parts is None:
            alike, row_limit, low, high, key_row = self._choose(tiles, many, covered, drawn)
        else:
            alike, row_limit, low, high, key_row = self._choose_fused(tiles, many, parts, covered, drawn)
        runs = Runs(
            first=index,
            size=1,
            log_weight=weight,
            low=low,
            high=high,
            causal=problem.causal and covered.gap is None,
            sample=DrawnSlots((self.num,), (True,)),
        )
        return ((alike, Selection((runs,), row_limit=row_limit, key_row=key_row)),), covered

    def _parts(self, tiles: Tiles) -> int | None:
        """Tell into how many parts kernels divide the heads of a group; None where PyTorch chooses."""
        problem, width = tiles.problem, tiles.problem.q.shape[3]
        # numbers of keys are counted in int32
        fits = problem.num_keys * width < 2**30 and grid_holds(problem.k.shape[0] * problem.k.shape[1])
        scores = fits and scores_alike(min(self.pooled, self.rows), width)
        fused = scores and triton_reads(problem.q, problem.k, problem.v)
        return parts_of(tiles.size, problem.group, self.rows, width) if fused else None

    def _choose_fused(
        self, tiles: Tiles, many: int, parts: int, covered: CoveredKeys, results: tuple[Tensor, Tensor]
    ) -> tuple[AlikeTiles, Tensor, Tensor, Tensor, Tensor]:
        """Sort and draw in kernels, into `results`.

        Returns:
            the sorted rows, how many keys each may see, first key and end of the keys of each list, and the keys' rows.
        """
        problem, edges = tiles.problem, edges_of(tiles, covered).of_tile
        k, v = problem.k.flatten(0, 1), problem.v.flatten(0, 1)
        centres, begin, noise, key_row = fused_first(k, v, self.num, tiles, many)
        ordered = FusedSort.of(tiles, many, fused_metric(k, centres, self.num), begin, edges, parts)
        groups = min(self.pooled, ordered.row_limit.shape[2])
        plan = fused_plan(tiles, BlockSizes(self.most), many, groups, self.num * self.candidates, parts)
        low, high = (results[0].new_empty(results[0].shape[:2]) for _ in range(2))
        blocks = FusedBlocks.of(k, v, centres, plan)
        fused_choice(problem, ordered, edges, noise, blocks, (*results, low, high), plan, self.uniform_share)
        return ordered.alike, ordered.row_limit, low, high, key_row

    def _choose(
        self, tiles: Tiles, many: int, covered: CoveredKeys, results: tuple[Tensor, Tensor]
    ) -> tuple[AlikeTiles, Tensor, Tensor, Tensor, Tensor]:
        """Do the same by operators of PyTorch."""
        problem, alike, left = tiles.problem, [], edges(tiles, covered)
        begin, noise = first_directions(problem), self._noise(tiles, many)
        known = tiles.by_list(tiles.known)
        k, v = problem.k.flatten(0, 1), problem.v.flatten(0, 1)
        metric = KeyMetric.of(k, self.num)
        # while no more keys than draws are left all are listed, so that those keys may tell of the others
        sizes = BlockSizes(self.most)
        blocks = blocks_of(k, v, sizes.all(tiles), self.num)
        # what is sorted at once is scored at once or in parts
        width = problem.q.shape[3]
        sorts = chunks(tiles, (_SORT_NUMBERS * problem.group * tiles.size + width) * width)
        parts = chunks(tiles, self._numbers(tiles, many), [*sizes.seams(tiles), *(at.start for at in sorts)])
        for whole in sorts:
            ordered, query, few = sort_alike(tiles, many, whole, begin, metric.of_tiles(known[:, whole]))
            scan = AlikeScan.of(tiles, query, few, min(self.pooled, query.shape[3]), whole.start)
            alike.append(ordered)
            # before the next ones are sorted
            del query, few
            for part in (part for part in parts if whole.start <= part.start < whole.stop):
                rows = slice(part.start * many, part.stop * many)
                some = tuple(x[:, part] for x in left)
                law = self._law(scan, blocks, some, part, sizes.of(tiles, part))
                results[0][:, rows], results[1][:, rows] = draws_of(law, some, noise[:, rows], self.num)
            del scan
        joined = AlikeTiles.joined(alike)
        limit = tiles.by_list(tiles.limit).repeat_interleave(problem.group, 2)
        limit = limit.gather(2, joined.inside.unflatten(1, (-1, many)).flatten(2)).view_as(joined.inside)
        low, high = (left[at][..., 0].repeat_interleave(many, 1) for at in (0, 3))
        lists = torch.arange(len(low), dtype=torch.int64, device=problem.device)
        return joined, limit.masked_fill(~joined.live, 0), low, high, lists

    def _noise(self, tiles: Tiles, many: int) -> Tensor:
        """Tell where inside a slot the points of each list of queries lie, ``[lists, tiles * many, 1]``."""
        problem = tiles.problem
        number = (tiles.index[:, None] * many + torch.arange(many, dtype=torch.int64, device=problem.device)).flatten()
        noise = uniform((problem.seed, problem.layer, problem.head_index[:, None, None], number[:, None], 0), problem.device)
        return noise.repeat(problem.k.shape[0], 1, 1)

    def _numbers(self, tiles: Tiles, many: int) -> int:
        """Count the numbers held for each tile of positions while drawing, in each list of keys."""
        candidates = min(tiles.problem.num_keys, max(self.most, room_of(self.num * self.candidates)))
        held = many * (_NUMBERS * candidates + _SLOT_NUMBERS * self.num)
        # averages of the sorted queries, no more of them than queries, are held as well
        return held + held // (_SORT_NUMBERS - 1)

    def _law(
        self, scan: AlikeScan, blocks: Mapping[int, KeyBlocks], left: tuple[Tensor, ...], part: slice, size: int
    ) -> Candidates:
        """Return the law of draws for a chunk of tiles, whose first blocks have `size` keys."""
        key, share = scan.shares(part, blocks, left, size, self.num * self.candidates)
        return Candidates.of(share, key, left, self.num, self.uniform_share)
