"""The levels of a descent, and how many blocks are opened at each."""

from dataclasses import dataclass

from hyperattention.check import positive
from hyperattention.select.score.representatives import Representatives

# blocks that an edge of what is left can cut: begin, hole begin, hole end, end
EDGES = 4
_MEAN = Representatives()


@dataclass(frozen=True)
class Level:
    """One level of a descent.

    Args:
        block_size: keys in a block.
        keep: blocks opened for each tile, at most; at least four, so that blocks cut by an edge always are.
        by: what stands for the keys of a block.

    Raises:
        ValueError: if a number is not positive, `keep` is below four, or the representatives do not fit the block.
    """

    block_size: int
    keep: int
    by: Representatives = _MEAN

    def __post_init__(self) -> None:
        positive("Level", block_size=self.block_size, keep=self.keep)
        if self.keep < EDGES:
            raise ValueError(f"{self!r}: keep at least {EDGES} blocks, as many as window and sequence can cut")
        self.by.check(self.block_size)


def opened_at(levels: tuple[Level, ...], num: int) -> list[int]:
    """Count the blocks opened at each level: those of the last hold at most half as many keys as are drawn, or are four."""
    *above, last = levels
    return [*(level.keep for level in above), max(EDGES, min(last.keep, num // (2 * last.block_size)))]


def first_level(levels: tuple[Level, ...], num: int, visible: int | float) -> int:
    """Number the level to begin with: coarser ones, all of whose blocks would be opened, tell nothing.

    Args:
        levels: from coarse to fine; the last two are always there, so that short sequences have coarse blocks too.
        num: draws of a tile.
        visible: keys that it sees.

    Returns:
        the level.
    """
    keep, depth = opened_at(levels, num), 0
    while depth + 2 < len(levels) and visible <= keep[depth] * levels[depth].block_size:
        depth += 1
    return depth
