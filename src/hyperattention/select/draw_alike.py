"""Draw for queries that look for similar keys, wherever in a tile they stand: each such list serves few and alike rows."""

from collections.abc import Callable
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
from hyperattention.select.score.alike_scan import NORMAL, AlikeScan, Blocks, blocks_of
from hyperattention.select.score.block_sizes import BlockSizes, last_made
from hyperattention.select.score.candidates import Candidates, candidates_of
from hyperattention.select.score.key_metric import KeyMetric
from hyperattention.select.score.pooling import chunks, edges, edges_of, seen_keys
from hyperattention.select.score.stretches import draws_of, stretches_of
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage, Tiling
from hyperattention.tiling import Tiles
from hyperattention.types import DrawnSlots, Runs, Selection

# float32 numbers held for each key before a hole, and each behind it, and list of queries; and for each slot, while drawing
_NUMBERS, _SLOT_NUMBERS = 5, 12
# the same for each key and tile while candidates are found
_COARSE_NUMBERS = 6
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
    `most` of them. Beyond that, few averages of the whole tile, groups of those of its lists, score every key; the keys of
    the largest shares are candidates, which all averages score, and the others share the even draws. Without candidates,
    blocks of 2, 4, 8, ... keys are scored, by their means and variances: a key unlike its neighbours is lost in them.
    On a GPU the averages, and so the candidates, are of those lists of a tile that a program holds: all of up to 8 of
    default size, which are those of 4 heads of a group; the lists of larger groups are cut into equal shares.

    Source: Han et al., 2023 (arXiv:2310.05869), its idea; Hansen and Hurwitz, 1943, sampling in proportion to size; Madow,
    1949, evenly spaced points; Derrida, 1981, sums of few large scores; Friedman et al., 1977, cuts at medians; Gonzalez,
    1985, centres far from one another; Roy et al., 2020 (arXiv:2003.05997), queries that
    share keys by their content. Differs: contents decide only who shares a draw, and estimates only what is drawn.
    Cost: `num` slots a query, and pooled / rows * min(keys seen, `most`) products; with candidates, pooled / rows *
    num * candidates beyond `most`, and coarse / rows * keys seen by averages of the tile, but no more than at `most`.
    Each key seen is read once a tile to find candidates, so beyond that time grows with the square of the length.
    Guarantee: numerator and denominator unbiased, whatever the estimate.

    Args:
        num: keys drawn for each list.
        rows: queries, of all heads of a group, that share a list; the fewer the better they are served, and the more is
            gathered. 64 fill the units of a GPU.
        pooled: averaged groups of each list.
        most: keys that a tile may see to be scored one by one, all of them.
        uniform_share: share of the draws that is spread evenly.
        candidates: keys, for each draw, that the lists of a tile score where it sees more; None scores blocks of keys there.
        coarse: averages of a tile, for each of its lists, that score all keys to find candidates; fewer where that would
            take more products than all averages take for `most` keys.

    Raises:
        ValueError: if a number is not positive, or the share is not between 0 and 1.
    """

    num: int
    rows: int = 64
    pooled: int = 8
    most: int = 32_768
    uniform_share: float = 0.1
    candidates: int | None = 12
    coarse: int = 4

    def __post_init__(self) -> None:
        positive("DrawAlike", num=self.num, rows=self.rows, pooled=self.pooled, most=self.most, coarse=self.coarse)
        if self.candidates is not None:
            positive("DrawAlike", candidates=self.candidates)
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
        """Count products of averages with blocks, their deviations and their means."""
        visible, many = num_keys / (2 if causal else 1), -(-tile // self.rows)
        products, fewer = 0.0, 0.0
        # the mean over tiles, by the share of them that sees each size of block
        edge, size = 0, 1
        while edge < num_keys:
            until = min(num_keys, self.most * size)
            share, seen = ((until - edge) / num_keys, (edge + until) / 2) if causal else (float(until == num_keys), visible)
            if size > 1 and self.candidates is not None:
                products += share * min(seen, self.num * self.candidates)
                # averages of the tile with its deviations, and stretches by those of its lists as well
                averages = self._coarse(many, size) * (1 + 2 / NORMAL) + self.pooled * many * 2 / NORMAL
                fewer += share * seen * (averages + 2)
            else:
                products += share * seen / size
            edge, size = until, size * 2
        return (products * (self.pooled * many * (1 + 2 / NORMAL) + 2 * many) + fewer) / tile

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
        # numbers of blocks are counted in int32
        blocks = problem.num_keys if self.candidates is not None else min(self.most, problem.num_keys)
        fits = blocks * width < 2**30 and grid_holds(problem.k.shape[0] * problem.k.shape[1])
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
        count = None if self.candidates is None else self.num * self.candidates
        candidates = count, self.coarse, self.pooled
        plan = fused_plan(tiles, BlockSizes(self.most), many, groups, candidates, parts)
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
        # no tile with blocks of this size sees more; while no more keys than draws are left all are listed, so that those
        # keys may tell of the others
        reach = k.shape[1] if self.candidates is not None else self.most
        blocks = last_made(lambda size: blocks_of(k[:, : reach * size], v[:, : reach * size], size, self.num))
        # what is sorted at once is scored at once or in parts
        width = problem.q.shape[3]
        sorts = chunks(tiles, (_SORT_NUMBERS * problem.group * tiles.size + width) * width)
        parts = chunks(tiles, self._numbers(tiles, many), [*BlockSizes(self.most).seams(tiles), *(at.start for at in sorts)])
        for whole in sorts:
            ordered, query, few = sort_alike(tiles, many, whole, begin, metric.of_tiles(known[:, whole]))
            scan = AlikeScan.of(tiles, query, few, min(self.pooled, query.shape[3]), whole.start)
            alike.append(ordered)
            # before the next ones are sorted
            del query, few
            for part in (part for part in parts if whole.start <= part.start < whole.stop):
                rows = slice(part.start * many, part.stop * many)
                some = tuple(x[:, part] for x in left)
                results[0][:, rows], results[1][:, rows] = self._draw(scan, blocks, some, noise[:, rows], covered, part)
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
        problem = tiles.problem
        lists, seen = problem.k.shape[0] * problem.k.shape[1], problem.num_keys
        blocks, sides = min(seen, max(self.most, self.num * (self.candidates or 0))), 1 if problem.causal else 2
        held, scored = many * (sides * _NUMBERS * blocks + _SLOT_NUMBERS * self.num), many * self.pooled * blocks
        if self.candidates is not None and seen > self.most:
            # shares of all keys by the averages of a tile
            held, scored = held + _COARSE_NUMBERS * seen, max(scored, many * self.coarse * seen)
        # scores are held for one list of keys at a time; on a CPU a few tiles at a time as well
        held += 0 if problem.device.type == "cpu" else -(-scored // lists)
        # averages of the sorted queries, no more of them than queries, are held as well
        return held + held // (_SORT_NUMBERS - 1)

    def _draw(
        self, scan: AlikeScan, blocks: Callable[[int], Blocks], left: tuple[Tensor, ...], noise: Tensor,
        covered: CoveredKeys, part: slice,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Draw for a chunk of tiles: keys and log-weights, ``[lists, chunk * many, num]``."""
        size, num = BlockSizes(self.most).of(scan.tiles, part)
        if size > 1 and self.candidates is not None:
            law = self._among_candidates(scan, blocks(1), left, part, size, self.num * self.candidates)
            return draws_of(law, left, noise, self.num)
        share = scan.shares(part, blocks(size), num)
        to_the_end = not (scan.tiles.problem.causal and covered.gap is not None)
        law = stretches_of(share, size, left, self.num, self.uniform_share, to_the_end)
        return draws_of(law, left, noise, self.num)

    def _coarse(self, many: int, doubled: int) -> int:
        """Count the averages that score all keys of a tile: no more products than where it sees `most` keys."""
        return max(1, min(self.coarse * many, self.pooled * many // doubled))

    def _among_candidates(
        self, scan: AlikeScan, keys: Blocks, left: tuple[Tensor, ...], part: slice, doubled: int, count: int
    ) -> Candidates:
        """Return the law of draws from `count` candidates and all others, where tiles see `doubled` times `most` keys."""
        coarse = scan.of_tiles(part).coarser(self._coarse(scan.query.shape[2], doubled))
        share = coarse.log_shares(part, keys, seen_keys(scan.tiles, part))[:, :, 0]
        found = candidates_of(share, left, count)
        return Candidates.of(scan.shares_among(part, keys, found), found, left, self.num, self.uniform_share)
