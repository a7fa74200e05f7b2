"""Who holds which tokens: cells of consecutive positions, and the other keys that a chunk of queries reads directly."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Cell:
    """Consecutive tokens of one chunk that one rank holds.

    Args:
        rank: the rank.
        start: position of the first token.
        stop: position after the last token.
        base: row of the first token in the rank's tensors.
    """

    rank: int
    start: int
    stop: int
    base: int

    @property
    def size(self) -> int:
        """Tokens of the cell."""
        return self.stop - self.start


@dataclass(frozen=True)
class Grid:
    """How a sequence is cut into chunks, whoever holds it.

    Args:
        chunk: positions in a chunk.
        near: keys before a chunk that its queries read directly.
        tile: positions in a block of averaged queries; divides `chunk`.
        num_keys: keys of the sequence.
        causal: whether a query sees only keys at or before its position.
    """

    chunk: int
    near: int
    tile: int
    num_keys: int
    causal: bool

    def number(self, cell: Cell) -> int:
        """Return the number of the chunk in which a cell lies."""
        return cell.start // self.chunk

    def low(self, chunk: int) -> int:
        """Return the first key that the queries of a chunk read directly."""
        return min(self.num_keys, max(0, chunk * self.chunk - self.near))

    def high(self, chunk: int) -> int:
        """Return the end of the keys that the queries of a chunk read directly."""
        return min(self.num_keys, (chunk + 1) * self.chunk + (0 if self.causal else self.near))

    def local(self, cell: Cell) -> tuple[int, int]:
        """Return the first and the end of the keys that a cell of queries reads directly."""
        chunk = self.number(cell)
        low = self.low(chunk)
        return low, max(low, min(cell.stop, self.num_keys) if self.causal else self.high(chunk))

    def pools(self, cell: Cell, chunk: int) -> bool:
        """Return whether a cell of keys has keys that a chunk of queries reads only through its pool."""
        return cell.start < self.low(chunk) or (not self.causal and cell.stop > self.high(chunk))

    def tiles(self, cell: Cell) -> int:
        """Count the blocks that a cell of queries touches."""
        return -(-cell.stop // self.tile) - cell.start // self.tile


@dataclass(frozen=True, eq=False)
class Layout:
    """All tokens of a sequence, cut into cells. A layout equals only itself, so that what is planned for it can be kept.

    Args:
        grid: the chunks.
        keys: cells of keys, by position.
        queries: cells of queries, by position.
    """

    grid: Grid
    keys: tuple[Cell, ...]
    queries: tuple[Cell, ...]

    @cached_property
    def chunks(self) -> dict[int, tuple[Cell, ...]]:
        """The cells of queries of each chunk, by the number of the chunk."""
        found: dict[int, list[Cell]] = {}
        for cell in self.queries:
            found.setdefault(self.grid.number(cell), []).append(cell)
        return {number: tuple(cells) for number, cells in found.items()}

    @cached_property
    def drawing(self) -> tuple[int, ...]:
        """The chunks that draw from some keys, by position."""
        return tuple(chunk for chunk in self.chunks if any(self._owners(chunk)))

    def owners(self, chunk: int) -> tuple[Cell, ...]:
        """Return the cells of keys that a chunk draws from, by position."""
        before, behind = self._owners(chunk)
        return self.keys[: len(before)] + self.keys[behind.start :]

    def _owners(self, chunk: int) -> tuple[range, range]:
        """Number the cells of keys that a chunk draws from: those that begin before its own keys, or end behind them."""
        before = bisect_left(self.keys, self.grid.low(chunk), key=lambda cell: cell.start)
        count = len(self.keys)
        if self.grid.causal:
            return range(before), range(count, count)
        behind = bisect_right(self.keys, self.grid.high(chunk), key=lambda cell: cell.stop)
        return range(before), range(max(before, behind), count)

    def holders(self, chunk: int) -> tuple[int, ...]:
        """Return the ranks that hold queries of a chunk; the first of them decides how much each owner draws."""
        return tuple(dict.fromkeys(cell.rank for cell in self.chunks[chunk]))

    def keys_of(self, rank: int) -> tuple[Cell, ...]:
        """Return a rank's own cells of keys, by position."""
        return tuple(cell for cell in self.keys if cell.rank == rank)

    def drawn_from(self, rank: int) -> tuple[tuple[int, Cell], ...]:
        """Return the pairs of a chunk and one of a rank's own cells of keys that the chunk draws from."""
        own = self.keys_of(rank)
        return tuple((chunk, cell) for chunk in self.drawing for cell in own if self.grid.pools(cell, chunk))


def cut(ranges: Iterable[tuple[int, int, int, int]], chunk: int) -> tuple[Cell, ...]:
    """Cut ranges of positions at the edges of chunks.

    Args:
        ranges: rank, first position, end and first row of each range.
        chunk: positions in a chunk.

    Returns:
        the cells, by position; empty ranges have none.
    """
    cells: list[Cell] = []
    for rank, start, stop, base in ranges:
        at = start
        while at < stop:
            end = min(stop, (at // chunk + 1) * chunk)
            cells.append(Cell(rank, at, end, base + at - start))
            at = end
    return tuple(sorted(cells, key=lambda cell: cell.start))


def parts(cells: Sequence[Cell], start: int, stop: int) -> Iterator[tuple[Cell, int, int]]:
    """Find who holds a range of positions.

    Args:
        cells: cells, by position.
        start: first position.
        stop: end.

    Yields:
        each cell that holds some of the range, with the first and the end of what it holds of it.
    """
    for number in range(bisect_right(cells, start, key=lambda cell: cell.stop), len(cells)):
        cell = cells[number]
        low, high = max(start, cell.start), min(stop, cell.stop)
        if low >= high:
            return
        yield cell, low, high
