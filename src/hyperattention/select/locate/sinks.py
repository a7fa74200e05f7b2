"""The first keys of every sequence, which most heads of most models use as a rest position."""

from dataclasses import dataclass, replace

import torch

from hyperattention.check import positive
from hyperattention.select.stage import CoveredKeys, Stage
from hyperattention.tiling import Tiles
from hyperattention.types import Runs


@dataclass(frozen=True)
class Sinks(Stage):
    """Attend to the first `num` live keys exactly: attention sinks carry weight in every row, and no sample may miss them.

    Source: Xiao et al., 2023 (arXiv:2309.17453).   Differs: nothing.
    Cost: `num` slots a query.   Guarantee: exact on the pairs taken.

    Args:
        num: keys taken.

    Raises:
        ValueError: if `num` is not positive.
    """

    num: int

    def __post_init__(self) -> None:
        positive("Sinks", num=self.num)

    @property
    def by_place(self) -> bool:
        """Position alone decides."""
        return True

    @property
    def reads_keys(self) -> bool:
        """Position alone decides."""
        return False

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile."""
        return self.num

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Take the first keys, unless an earlier stage has."""
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
        return (runs,), replace(covered, prefix=max(covered.prefix, self.num), placed=covered.placed + self.num)
