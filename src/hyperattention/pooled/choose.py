"""Choose the keys of every pool: the ranks exchange averages of queries, sums of scores and counts of shares."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hyperattention.pooled.averages import averages, unpacked
from hyperattention.pooled.law import CERTAIN, NUM_REPLY, NUM_SIZES, Drawn, draw, histogram, replies
from hyperattention.pooled.layout import Cell, Layout
from hyperattention.pooled.pool import Choice, Near, Shard, Sizes
from hyperattention.pooled.route import Move, Route, World, columns, joined, route_of
from hyperattention.pooled.scores import best_shares, log_sums, near_sums


@torch.no_grad()
def choose(world: World, layout: Layout, shard: Shard, near: Near, sizes: Sizes) -> Choice:
    """Choose the keys of the pools of this rank's chunks, and of its own keys those that other pools get.

    Six exchanges: averages of queries go to the owners of the keys that they do not read directly; sums over each owner's
    scores come back, and their total, with that of the keys read directly, goes out, so that shares are shares of all keys;
    counts of keys by the size of their share go to the first holder of a chunk, which replies how many each owner lists;
    then chances travel.

    Args:
        world: the ranks.
        layout: who holds which tokens.
        shard: this rank's tokens.
        near: the keys that this rank's queries read directly.
        sizes: the sizes of pools.

    Returns:
        the pools of this rank.
    """
    book = _Book.of(world, layout, sizes)
    own = {cell: averages(shard, layout, world.rank, cell, sizes.groups) for cell in book.begins(world.rank)}
    asked = _ask(world, book, shard, own)
    totals = _totals(world, book, shard, asked, _near(book, shard, near, own))
    shares = [
        best_shares(
            shard, cell, book.own_of(asked, chunk), book.own_of(totals, chunk), shard.eligible(layout, chunk, cell)
        ).masked_fill(shard.certain(sizes.sinks, layout.keys_of(world.rank).index(cell), cell), CERTAIN)
        for chunk, cell in book.pairs
    ]
    told = _told(world, book, shard, shares)
    drawn = [
        draw(share, shard.eligible(layout, chunk, cell), told[:, number], shard.noise(chunk))
        for number, (share, (chunk, cell)) in enumerate(zip(shares, book.pairs, strict=True))
    ]
    return _pools(world, book, shard, drawn, told)


@dataclass(frozen=True)
class _Book:
    """Where this rank keeps what belongs to which chunk, and what every rank keeps where.

    Args:
        rank: this rank.
        layout: who holds which tokens.
        sizes: the sizes of pools.
        pairs: pairs of a chunk and one of this rank's cells of keys that the chunk draws from.
    """

    rank: int
    layout: Layout
    sizes: Sizes
    pairs: tuple[tuple[int, Cell], ...]

    @classmethod
    def of(cls, world: World, layout: Layout, sizes: Sizes) -> "_Book":
        return cls(world.rank, layout, sizes, layout.drawn_from(world.rank))

    def count(self, cell: Cell) -> int:
        """Count the averages of a cell of queries."""
        return self.layout.grid.tiles(cell) * self.sizes.groups

    def total(self, chunk: int) -> int:
        """Count the averages of a chunk."""
        return sum(map(self.count, self.layout.chunks[chunk]))

    def begins(self, rank: int) -> dict[Cell, int]:
        """Tell where the averages of each of a rank's own cells of queries begin."""
        own = [cell for chunk in self.layout.owners for cell in self.layout.chunks[chunk] if cell.rank == rank]
        return dict(zip(own, accumulate(map(self.count, own), initial=0), strict=False))

    def asked(self, rank: int) -> dict[int, int]:
        """Tell where the averages of each chunk that draws from a rank begin there."""
        chunks = list(dict.fromkeys(chunk for chunk, _ in self.layout.drawn_from(rank)))
        return dict(zip(chunks, accumulate(map(self.total, chunks), initial=0), strict=False))

    def own_of(self, asked: Tensor, chunk: int) -> Tensor:
        """Cut what belongs to a chunk out of the columns that reached this rank."""
        begin = self.asked(self.rank)[chunk]
        return asked[:, begin : begin + self.total(chunk)]

    def home(self, chunk: int) -> int:
        """Return the rank that decides for a chunk."""
        return self.layout.holders(chunk)[0]


def _outward(book: _Book, ranks: int) -> Iterable[Move]:
    """Move what belongs to the averages from their rank to the owners of keys."""
    begins, asked = [book.begins(rank) for rank in range(ranks)], [book.asked(rank) for rank in range(ranks)]
    for chunk, owners in book.layout.owners.items():
        at = 0
        for cell in book.layout.chunks[chunk]:
            start, count = begins[cell.rank][cell], book.count(cell)
            for rank in dict.fromkeys(owner.rank for owner in owners):
                yield Move(cell.rank, start, start + count, rank, asked[rank][chunk] + at)
            at += count


def _widths(book: _Book) -> tuple[int, int]:
    own, asked = book.begins(book.rank), book.asked(book.rank)
    return sum(map(book.count, own)), sum(map(book.total, asked))


def _ask(world: World, book: _Book, shard: Shard, own: dict[Cell, Tensor]) -> Tensor:
    """Send averages to the owners of keys; give those that reached this rank, ``[lists, averages, head_dim + 1]``."""
    device = shard.k.device
    nothing = torch.empty(shard.lists, 0, shard.q.shape[3] + 4, dtype=torch.uint8, device=device)
    route = route_of("averages", world, _outward(book, world.size), shard.lists, _widths(book), device)
    return unpacked(columns(world, route, torch.cat([nothing, *own.values()], 1)), shard.dtype)


def _near(book: _Book, shard: Shard, near: Near, own: dict[Cell, Tensor]) -> Tensor:
    """Add up each own average's scores over the keys that its queries read directly, ``[lists, averages]``."""
    grid, begin, sums = book.layout.grid, 0, [shard.k.new_empty(shard.lists, 0, dtype=shard.dtype)]
    for cell in (cell for cell in book.layout.queries if cell.rank == book.rank):
        if cell in own:
            sums.append(near_sums(near, begin, cell, grid, unpacked(own[cell], shard.dtype)))
        low, high = grid.local(cell)
        begin += high - low
    return torch.cat(sums, 1)


def _totals(world: World, book: _Book, shard: Shard, asked: Tensor, near: Tensor) -> Tensor:
    """Add up the sums of all owners for every average, and of the keys near it; give those of the averages here."""
    layout, device = book.layout, shard.k.device
    own = [
        log_sums(shard, cell, book.own_of(asked, chunk), shard.eligible(layout, chunk, cell)) for chunk, cell in book.pairs
    ]
    sums = torch.cat(own, 1) if own else asked.new_empty(shard.lists, 0)
    moves, widths = _inward(book, world.size)
    route = route_of("sums", world, moves, shard.lists, widths, device)
    returned, totals, at = columns(world, route, sums[..., None])[..., 0], [], 0
    for cell in book.begins(world.rank):
        owners = len(layout.owners[layout.grid.number(cell)])
        some = returned[:, at : at + owners * book.count(cell)].unflatten(1, (owners, -1))
        totals.append(some.double().logsumexp(1).to(shard.dtype))
        at += owners * book.count(cell)
    total = torch.logaddexp(torch.cat(totals, 1), near) if totals else asked.new_empty(shard.lists, 0)
    route = route_of("totals", world, _outward(book, world.size), shard.lists, _widths(book), device)
    return columns(world, route, total[..., None])[..., 0]


def _inward(book: _Book, ranks: int) -> tuple[list[Move], tuple[int, int]]:
    """Move sums of each pair of a chunk and an owner to the ranks of the averages."""
    moves, given, got = [], [0] * ranks, [0] * ranks
    sources: dict[tuple[int, Cell], int] = {}
    for rank in range(ranks):
        for pair in book.layout.drawn_from(rank):
            sources[pair] = given[rank]
            given[rank] += book.total(pair[0])
    for chunk, owners in book.layout.owners.items():
        at = 0
        for cell in book.layout.chunks[chunk]:
            count = book.count(cell)
            for owner in owners:
                start = sources[chunk, owner] + at
                moves.append(Move(owner.rank, start, start + count, cell.rank, got[cell.rank]))
                got[cell.rank] += count
            at += count
    return moves, (given[book.rank], got[book.rank])


def _told(world: World, book: _Book, shard: Shard, shares: list[Tensor]) -> Tensor:
    """Let the first holder of each chunk decide; give the replies for own pairs, then all for each chunk held here."""
    layout, device = book.layout, shard.k.device
    numbers = [
        histogram(share, shard.eligible(layout, chunk, cell))
        for share, (chunk, cell) in zip(shares, book.pairs, strict=True)
    ]
    x = (
        torch.stack(numbers, 1)
        if numbers
        else torch.empty(shard.lists, 0, 2 * NUM_SIZES, dtype=torch.float64, device=device)
    )
    place = [{pair: at for at, pair in enumerate(layout.drawn_from(rank))} for rank in range(world.size)]
    gathered, forward, back, held = [0] * world.size, [], [], [len(each) for each in place]
    for chunk, owners in layout.owners.items():
        home = book.home(chunk)
        for cell in owners:
            at, number = gathered[home], place[cell.rank][chunk, cell]
            forward.append(Move(cell.rank, number, number + 1, home, at))
            back.append(Move(home, at, at + 1, cell.rank, number))
            gathered[home] += 1
            for rank in layout.holders(chunk):
                back.append(Move(home, at, at + 1, rank, held[rank]))
                held[rank] += 1
    width = gathered[world.rank]
    route = route_of("counts", world, forward, shard.lists, (len(book.pairs), width), device)
    counts, decided, at = columns(world, route, x), [], 0
    for chunk, owners in layout.owners.items():
        if book.home(chunk) == world.rank:
            part = counts[:, at : at + len(owners)]
            decided.append(replies(part, book.sizes.num, book.sizes.even, shard.noise(chunk)))
            at += len(owners)
    answer = torch.cat(decided, 1) if decided else x.new_empty(shard.lists, 0, NUM_REPLY)
    route = route_of("replies", world, back, shard.lists, (width, held[world.rank]), device)
    return columns(world, route, answer)


def _pools(world: World, book: _Book, shard: Shard, drawn: list[Drawn], told: Tensor) -> Choice:
    """Make the route of drawn keys into the pools, and send their chances along it."""
    layout, num, device = book.layout, book.sizes.num, shard.k.device
    chunks = tuple(chunk for chunk in layout.owners if world.rank in layout.holders(chunk))
    lists = torch.arange(shard.lists, dtype=torch.int64, device=device)[:, None]
    send: list[list[Tensor]] = [[] for _ in range(world.size)]
    chance: list[list[Tensor]] = [[] for _ in range(world.size)]
    place: list[list[Tensor]] = [[] for _ in range(world.size)]
    for each, (chunk, cell) in zip(drawn, book.pairs, strict=True):
        slot = torch.arange(each.index.shape[1], dtype=torch.int64, device=device)
        listed = slot < each.points[:, None]
        rows = (lists * shard.k.shape[2] + cell.base + each.index)[listed]
        for rank in layout.holders(chunk):
            send[rank].append(rows)
            chance[rank].append(each.chance[listed])
    at = len(book.pairs)
    for number, chunk in enumerate(chunks):
        for cell in layout.owners[chunk]:
            first, points = told[:, at, -2:].long().unbind(1)
            slot = torch.arange(int(points.max()) if points.numel() else 0, dtype=torch.int64, device=device)
            rows = lists * (len(chunks) * num) + number * num + first[:, None] + slot
            place[cell.rank].append(rows[slot < points[:, None]])
            at += 1
    route = Route("pool", joined(send, device), joined(place, device), shard.lists * len(chunks) * num)
    own = torch.cat([torch.cat(part) for part in chance if part] or [told.new_empty(0)])
    begin = [0, *accumulate(len(rows) for rows in route.send)]
    of_rank = tuple(torch.arange(low, high, dtype=torch.int64, device=device) for low, high in pairwise(begin))
    weights = Route("weights", of_rank, route.place, route.rows)
    found = world.move(weights, own.to(shard.dtype)[:, None]).view(shard.lists, len(chunks), num)
    return Choice(chunks, route, (-found.log()).masked_fill(found == 0, -torch.inf))
