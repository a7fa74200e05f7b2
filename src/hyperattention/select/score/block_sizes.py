"""How many keys the blocks have that are scored first: more where a tile sees more, so that never too many are scored."""

from dataclasses import dataclass

from hyperattention.select.score.pooling import seen_keys
from hyperattention.tiling import Tiles

# blocks that a larger one is opened into
OPENED = 4


@dataclass(frozen=True)
class BlockSizes:
    """Blocks of 1, 4, 16, ... keys.

    Args:
        most: blocks that a tile may see.
    """

    most: int

    def size(self, seen: int) -> int:
        """Return how many keys a block has where a tile sees so many."""
        size = 1
        while -(-seen // size) > self.most:
            size *= OPENED
        return size

    def of(self, tiles: Tiles, part: slice) -> int:
        """Return how many keys a block has for a chunk of tiles."""
        return self.size(seen_keys(tiles, part))

    def all(self, tiles: Tiles) -> tuple[int, ...]:
        """List the sizes of blocks down to which the last tile's are opened, the smallest first."""
        sizes, size = [1], self.of(tiles, slice(0, len(tiles.index)))
        while sizes[-1] < size:
            sizes.append(sizes[-1] * OPENED)
        return tuple(sizes)

    def seams(self, tiles: Tiles) -> list[int]:
        """Number the first tiles that see too many keys for each size of block."""
        if not tiles.problem.causal:
            return []
        seams, size = [], self.most
        while size < tiles.problem.num_keys + tiles.size:
            seams.append(tiles.before(size // tiles.size))
            size *= OPENED
        return seams
