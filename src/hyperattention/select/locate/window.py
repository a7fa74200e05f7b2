"""The sliding window: the keys around each tile."""

from dataclasses import dataclass, replace

import torch

from hyperattention.check import positive
from hyperattention.select.stage import CoveredKeys, Stage
from hyperattention.tiling import Tiles
from hyperattention.types import Runs


@dataclass(frozen=True)
class Window(Stage):
    """Take the nearest keys: every query sees at least the `size` keys before it.

    The window of a tile begins `size` live keys before the tile, so all rows of a tile share one run: the first row sees
    exactly `size` earlier keys, the last row up to one tile more. Without a causal mask the window extends `size` / 2 keys
    to either side.

    Source: Beltagy et al., 2020 (arXiv:2004.05150), sliding window.   Differs: aligned to tiles.
    Cost: `size` + tile slots per query.   Guarantee: exact on the pairs taken.

    Args:
        size: number of keys before the tile (or on both sides together).

    Raises:
        ValueError: if `size` is not positive.
    """

    size: int

    def __post_init__(self) -> None:
        positive("Window", size=self.size)

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
        return self.size + tile

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Take the keys around each tile, except those of an earlier stage."""
        causal = tiles.problem.causal
        before = self.size if causal else self.size // 2
        first = tiles.start - before
        end = tiles.end if causal else torch.minimum(tiles.end + self.size - before, tiles.total)
        low = torch.minimum(torch.full_like(first, covered.prefix), end)
        weight = torch.zeros((*first.shape, 1), dtype=torch.float32, device=first.device)
        pieces = ((first, before, False), (tiles.start, tiles.size + (0 if causal else self.size - before), causal))
        runs = tuple(
            Runs(
                first=tiles.by_list(begin[..., None]),
                size=size,
                log_weight=tiles.by_list(weight),
                low=tiles.by_list(low),
                high=tiles.by_list(tiles.start if size == before and begin is first else end),
                causal=tested,
            )
            for begin, size, tested in pieces
            if size
        )
        gap, placed = (torch.maximum(first, low), end), covered.placed + self.slots(tiles.size)
        return runs, replace(covered, gap=gap, near=before, placed=placed, edges=None)
