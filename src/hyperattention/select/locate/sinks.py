"""Attention sinks: the first keys of every sequence, which get much attention in most heads of most models."""

from dataclasses import dataclass, replace

import torch

from hyperattention.check import positive
from hyperattention.select.stage import CoveredKeys, Stage
from hyperattention.tiling import Tiles
from hyperattention.types import Runs


@dataclass(frozen=True)
class Sinks(Stage):
    """Take the first `num` live keys: attention sinks have a large weight in every row, and a sample must not miss them.

    Source: Xiao et al., 2023 (arXiv:2309.17453).   Differs: nothing.
    Cost: `num` slots per query.   Guarantee: exact on the pairs taken.

    Args:
        num: number of keys taken.

    Raises:
        ValueError: if `num` is not positive.
    """

    num: int

    def __post_init__(self) -> None:
        positive("Sinks", num=self.num)

    @property
    def by_place(self) -> bool:
        """True: the keys depend only on position."""
        return True

    @property
    def reads_keys(self) -> bool:
        """False: the choice depends only on position."""
        return False

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile."""
        return self.num

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Take the first keys, unless an earlier stage took them."""
        begin, hole_begin, hole_end, end = covered.bounds(tiles)
        first = torch.zeros_like(begin)[..., None]
        runs = Runs(
            first=tiles.by_list(first),
            size=self.num,
            log_weight=tiles.by_list(torch.zeros(first.shape, dtype=torch.float32, device=first.device)),
            low=tiles.by_list(begin),
            high=tiles.by_list(end.clamp(max=self.num)),
            causal=tiles.problem.causal,
            hole=None if covered.gap is None else (tiles.by_list(hole_begin), tiles.by_list(hole_end)),
        )
        return (runs,), replace(covered, prefix=max(covered.prefix, self.num), placed=covered.placed + self.num, edges=None)
