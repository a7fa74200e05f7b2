"""The levels of a hierarchical search, and the number of blocks opened at each."""

from dataclasses import dataclass

from hyperattention.check import instance, positive
from hyperattention.select.score.representatives import Representatives

# blocks that an edge of the remaining keys can cut: begin, hole begin, hole end, end
EDGES = 4
_MEAN = Representatives()


@dataclass(frozen=True)
class Level:
    """One level of a hierarchical search.

    Args:
        block_size: number of keys in a block.
        keep: largest number of blocks opened for each tile; at least four, so that blocks cut by an edge are always opened.
        by: representatives of the keys of a block.

    Raises:
        ValueError: if a number is not positive, `keep` is below four, or the representatives do not fit the block.
        TypeError: if `by` is no `Representatives`.
    """

    block_size: int
    keep: int
    by: Representatives = _MEAN

    def __post_init__(self) -> None:
        positive("Level", block_size=self.block_size, keep=self.keep)
        if self.keep < EDGES:
            raise ValueError(f"{self!r}: keep at least {EDGES} blocks, as many as window and sequence can cut")
        instance("Level", Representatives, "Representatives(1, 2)", by=self.by)
        self.by.check(self.block_size)


def opened_at(levels: tuple[Level, ...], num: int) -> list[int]:
    """Count the blocks opened at each level; those of the last level hold at most half of the draws, or are four blocks."""
    *above, last = levels
    return [*(level.keep for level in above), max(EDGES, min(last.keep, num // (2 * last.block_size)))]


def first_level(levels: tuple[Level, ...], num: int, visible: int | float) -> int:
    """Return the level to begin with: at coarser levels all blocks would be opened, so they are skipped.

    Args:
        levels: levels from coarse to fine; the last two are never skipped, so that short sequences have coarse blocks too.
        num: number of draws of a tile.
        visible: number of keys that the tile sees.

    Returns:
        the index of the level.
    """
    keep, depth = opened_at(levels, num), 0
    while depth + 2 < len(levels) and visible <= keep[depth] * levels[depth].block_size:
        depth += 1
    return depth
