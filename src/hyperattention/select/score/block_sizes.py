"""How many keys a block has: the more a tile sees, the larger its blocks are, so that it never scores too many."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hyperattention.select.score.pooling import seen_keys
from hyperattention.tiling import Tiles

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class BlockSizes:
    """Blocks of 1, 2, 4, ... keys.

    Args:
        most: blocks that a tile may see.
    """

    most: int

    def size(self, seen: int) -> int:
        """Return how many keys a block has where a tile sees so many."""
        size = 1
        while -(-seen // size) > self.most:
            size *= 2
        return size

    def of(self, tiles: Tiles, part: slice) -> tuple[int, int]:
        """Return how many keys a block has for a chunk of tiles, and how many blocks they may see."""
        seen = seen_keys(tiles, part)
        size = self.size(seen)
        return size, -(-seen // size)

    def seams(self, tiles: Tiles) -> list[int]:
        """Number the first tiles that see too many keys for each size of block."""
        if not tiles.problem.causal:
            return []
        seams, size = [], self.most
        while size < tiles.problem.num_keys + tiles.size:
            seams.append(tiles.before(size // tiles.size))
            size *= 2
        return seams

    def doublings(self, tiles: Tiles) -> tuple[int, tuple[int, ...]]:
        """Return how many keys the first tile's blocks have, and the first tile for each doubling of them."""
        first, last = (self.size(seen_keys(tiles, slice(0, end))) for end in (1, len(tiles.index)))
        seams, size = [], first
        while size < last:
            seams.append(tiles.before(self.most * size // tiles.size))
            size *= 2
        return first, tuple(seams)


def last_made(make: Callable[[int], _Made]) -> Callable[[int], _Made]:
    """Make something for each size that is asked for; only the last one is kept, as tiles come in order."""
    made: dict[int, _Made] = {}

    def of(size: int) -> _Made:
        if size not in made:
            made.clear()
            made[size] = make(size)
        return made[size]

    return of
