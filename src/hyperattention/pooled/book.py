"""Where a rank keeps what belongs to which chunk, and what it sends and receives to choose the keys of pools.

Every rank plans its own moves alone. Both ends of a message list its parts in one order: by chunk, then by cell.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

from hyperattention.pooled.layout import Cell, Layout
from hyperattention.pooled.route import Moves, Run


@dataclass(frozen=True, eq=False)
class Book:
    """The plan of one rank for one layout. What it computes, it keeps.

    Args:
        layout: who holds which tokens.
        rank: the rank.
        groups: averages of each block of queries.
    """

    layout: Layout
    rank: int
    groups: int

    @cached_property
    def keys(self) -> tuple[Cell, ...]:
        """The rank's own cells of keys, by position."""
        return self.layout.keys_of(self.rank)

    @cached_property
    def pairs(self) -> tuple[tuple[int, Cell], ...]:
        """Pairs of a chunk and one of the rank's cells of keys that the chunk draws from."""
        return self.layout.drawn_from(self.rank)

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Chunks that draw, of which the rank holds queries."""
        return tuple(chunk for chunk in self.layout.drawing if self.rank in self.layout.holders(chunk))

    @cached_property
    def homed(self) -> tuple[int, ...]:
        """Chunks that draw, for which the rank decides."""
        return tuple(chunk for chunk in self.chunks if self.home(chunk) == self.rank)

    def home(self, chunk: int) -> int:
        """Return the rank that decides for a chunk."""
        return self.layout.holders(chunk)[0]

    def count(self, cell: Cell) -> int:
        """Count the averages of a cell of queries."""
        return self.layout.grid.tiles(cell) * self.groups

    def total(self, chunk: int) -> int:
        """Count the averages of a chunk."""
        return sum(map(self.count, self.layout.chunks[chunk]))

    @cached_property
    def begins(self) -> dict[Cell, int]:
        """Where the averages of each of the rank's own cells of queries begin."""
        own = [cell for chunk in self.chunks for cell in self.layout.chunks[chunk] if cell.rank == self.rank]
        return dict(zip(own, accumulate(map(self.count, own), initial=0), strict=False))

    @cached_property
    def asked(self) -> dict[int, tuple[int, int]]:
        """Where the averages of each chunk that draws from the rank begin and end here."""
        found, at = {}, 0
        for chunk in dict.fromkeys(chunk for chunk, _ in self.pairs):
            found[chunk] = at, at + self.total(chunk)
            at = found[chunk][1]
        return found

    @cached_property
    def outward(self) -> Moves:
        """How what belongs to the averages goes from their rank to the owners of keys."""
        send = [(rank, self.begins[cell], self.count(cell)) for cell in self.begins for rank in self._owners_of(cell)]
        place: list[Run] = []
        for chunk, (at, _) in self.asked.items():
            for cell in self.layout.chunks[chunk]:
                place.append((cell.rank, at, self.count(cell)))
                at += self.count(cell)
        widths = sum(map(self.count, self.begins)), sum(map(self.total, self.asked))
        return Moves.of(send, place, widths)

    def _owners_of(self, cell: Cell) -> dict[int, None]:
        """List the ranks that own keys that the chunk of a cell of queries draws from."""
        return dict.fromkeys(owner.rank for owner in self.layout.owners(self.layout.grid.number(cell)))

    @cached_property
    def inward(self) -> Moves:
        """How sums of each pair of a chunk and an owner go to the ranks of the averages."""
        ends = list(accumulate((self.total(chunk) for chunk, _ in self.pairs), initial=0))
        send = [(rank, at, count) for rank, at, count in self._parts(ends)]
        place, got = [], 0
        for cell in self.begins:
            for owner in self.layout.owners(self.layout.grid.number(cell)):
                place.append((owner.rank, got, self.count(cell)))
                got += self.count(cell)
        return Moves.of(send, place, (ends[-1], got))

    def _parts(self, begins: list[int]) -> Iterator[Run]:
        """Cut the sums of own pairs into those of each cell of queries: by chunk, cell and pair."""
        of_chunk: dict[int, list[int]] = {}
        for number, (chunk, _) in enumerate(self.pairs):
            of_chunk.setdefault(chunk, []).append(begins[number])
        for chunk, starts in of_chunk.items():
            at = 0
            for cell in self.layout.chunks[chunk]:
                for start in starts:
                    yield cell.rank, start + at, self.count(cell)
                at += self.count(cell)

    @cached_property
    def forward(self) -> Moves:
        """How one column of each pair goes to the rank that decides for its chunk."""
        send = [(self.home(chunk), number, 1) for number, (chunk, _) in enumerate(self.pairs)]
        owners = [owner.rank for chunk in self.homed for owner in self.layout.owners(chunk)]
        return Moves.of(send, [(rank, at, 1) for at, rank in enumerate(owners)], (len(self.pairs), len(owners)))

    @cached_property
    def back(self) -> Moves:
        """How one column of each pair goes back to its owner, and to all ranks that hold queries of its chunk."""
        send: list[Run] = []
        owners = [(chunk, owner) for chunk in self.homed for owner in self.layout.owners(chunk)]
        for at, (chunk, owner) in enumerate(owners):
            send += [(rank, at, 1) for rank in (owner.rank, *self.layout.holders(chunk))]
        place: list[Run] = []
        own = {pair: number for number, pair in enumerate(self.pairs)}
        held, chunks = len(own), set(self.chunks)
        for chunk in self.layout.drawing:
            mine = chunk in chunks
            for owner in self.layout.owners(chunk) if mine else self.keys:
                if (chunk, owner) in own:
                    place.append((self.home(chunk), own[chunk, owner], 1))
                if mine:
                    place.append((self.home(chunk), held, 1))
                    held += 1
        return Moves.of(send, place, (len(owners), held))


@lru_cache(maxsize=32)
def book_of(layout: Layout, rank: int, groups: int) -> Book:
    """Return the plan of a rank, made once for a layout.

    Args:
        layout: who holds which tokens.
        rank: the rank.
        groups: averages of each block of queries.

    Returns:
        the plan.
    """
    return Book(layout, rank, groups)
