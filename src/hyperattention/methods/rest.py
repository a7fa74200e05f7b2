"""The keys that leading stages leave of each row by position: ranges that need no list."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from hyperattention.problem import Problem
from hyperattention.select.stage import CoveredKeys, Stage, Tiling
from hyperattention.tiling import Tiles, cut
from hyperattention.types import Selection


def by_place(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Return the leading stages that take ranges of positions.

    Args:
        stages: stages of a method, in order.

    Returns:
        those before the first that chooses keys otherwise.
    """
    number = next((place for place, stage in enumerate(stages) if not stage.by_place), len(stages))
    return stages[:number]


@dataclass(frozen=True)
class Rest:
    """The keys that each row sees and no leading stage took by position: one range of leading keys, and one of last keys.

    Args:
        begin: first key of the first range, the same for all rows.
        before: end of the first range for every row.
        after: first key of the second range for every row, which ends with the last live key; None if there is none.
        total: live keys of each batch row.
        num_runs: runs that the leading stages list.
        known: leading keys that every row with a rest sees.
        surely_empty: whether no row has a rest, as far as positions tell without reading from the device.
        plain: whether each row's first range ends where the row's sight does: with the row, or with the last key.
    """

    begin: int
    before: Int[Tensor, "batch queries"]
    after: Int[Tensor, "batch queries"] | None
    total: Int[Tensor, "batch 1"]
    num_runs: int
    known: int
    surely_empty: bool
    plain: bool = False

    @classmethod
    def of(cls, problem: Problem, stages: tuple[Stage, ...], tile: int) -> "Rest":
        """Run the leading stages, and see what they leave.

        Args:
            problem: the problem.
            stages: all stages of the method, in order.
            tile: positions in a tile.

        Returns:
            the ranges.
        """
        tiles, covered, num_runs = cut(problem, tile), CoveredKeys(), 0
        for stage in by_place(stages):
            runs, covered = stage.select(tiles, covered)
            num_runs += len(runs)
        _, hole_begin, hole_end, _ = covered.bounds(tiles)
        limit = tiles.limit.flatten(1)[:, tiles.front : tiles.front + problem.num_queries]
        before = torch.minimum(_of_rows(tiles, hole_begin), limit).clamp(min=covered.prefix)
        two_sided = covered.gap is not None and not problem.causal
        # a row with a rest is in a tile that begins after prefix and window: it sees these keys, and one of the rest
        known = covered.prefix + max(1, covered.near) if problem.causal else problem.num_keys
        # the last tile's first row comes at most so late: masked keys only move it forward
        start = tiles.number(len(tiles.index) - 1) * tile
        near = problem.causal and covered.gap is not None and start <= covered.prefix + covered.near
        return cls(
            covered.prefix,
            before,
            _of_rows(tiles, hole_end) if two_sided else None,
            tiles.total,
            num_runs,
            known,
            near or problem.num_keys <= covered.prefix,
            covered.gap is None and all(x is None for x in (problem.rank, problem.key_mask, problem.spans)),
        )

    @property
    def count(self) -> Int[Tensor, "batch 1 queries"]:
        """Count the keys of every row's rest."""
        count = (self.before - self.begin).clamp(min=0)
        return (count if self.after is None else count + (self.total - self.after).clamp(min=0))[:, None]

    def centring(self, centred: bool) -> Int[Tensor, "batch 1"]:
        """Count the leading keys whose mean is the centre: 0 for none."""
        return self.total.clamp(max=self.known if centred else 0)


def _of_rows(tiles: Tiles, x: Int[Tensor, "batch tiles"]) -> Int[Tensor, "batch queries"]:
    """Give every row the number of its tile."""
    return x.repeat_interleave(tiles.size, 1)[:, tiles.front : tiles.front + tiles.problem.num_queries]


def without_leading(selected: tuple[tuple[Tiling, Selection], ...], num_runs: int) -> tuple[tuple[Tiling, Selection], ...]:
    """Drop the runs of the leading stages, which come first in the tiling of positions, and tilings without runs.

    Args:
        selected: every tiling with its lists, the tiling of positions first; empty for no stages.
        num_runs: runs of the leading stages.

    Returns:
        the tilings and lists of all other stages.
    """
    if not selected:
        return ()
    (tiles, shared), *apart = selected
    far = ((tiles, replace(shared, runs=shared.runs[num_runs:])), *apart)
    return tuple((tiling, selection) for tiling, selection in far if selection.runs)
