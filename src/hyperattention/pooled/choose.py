"""Choose the keys of every pool: the ranks exchange averages of queries, sums of scores and counts of shares."""

from dataclasses import replace

import torch
from torch import Tensor

from hyperattention.pooled.averages import averages, unpacked
from hyperattention.pooled.book import Book, book_of
from hyperattention.pooled.law import CERTAIN, NUM_REPLY, NUM_SIZES, Drawn, draw, histogram, replies
from hyperattention.pooled.layout import Cell, Layout
from hyperattention.pooled.pool import Choice, Near, Shard, Sizes
from hyperattention.pooled.route import World, columns, counted, joined, route_of, spread
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
    book = book_of(layout, world.rank, sizes.groups)
    own = {cell: averages(shard, layout.grid, book.keys, cell, book.groups) for cell in book.begins}
    asked = _ask(world, book, shard, own)
    totals = _totals(world, book, shard, asked, _near(book, shard, near, own))
    number = {cell: at for at, cell in enumerate(book.keys)}
    shares = [
        best_shares(
            shard, cell, _own_of(book, asked, chunk), _own_of(book, totals, chunk), shard.eligible(layout, chunk, cell)
        ).masked_fill(shard.certain(sizes.sinks, number[cell], cell), CERTAIN)
        for chunk, cell in book.pairs
    ]
    told = _told(world, book, shard, sizes, shares)
    drawn = [
        draw(share, shard.eligible(layout, chunk, cell), told[:, number], shard.noise(chunk))
        for number, (share, (chunk, cell)) in enumerate(zip(shares, book.pairs, strict=True))
    ]
    return _pools(world, book, shard, sizes, drawn, told)


def _own_of(book: Book, asked: Tensor, chunk: int) -> Tensor:
    """Cut what belongs to a chunk out of the columns that reached this rank."""
    begin, end = book.asked[chunk]
    return asked[:, begin:end]


def _ask(world: World, book: Book, shard: Shard, own: dict[Cell, Tensor]) -> Tensor:
    """Send averages to the owners of keys; give those that reached this rank, ``[lists, averages, head_dim + 1]``."""
    device = shard.k.device
    nothing = torch.empty(shard.lists, 0, shard.q.shape[3] + 4, dtype=torch.uint8, device=device)
    route = route_of("averages", world, book.outward, shard.lists, device)
    return unpacked(columns(world, route, torch.cat([nothing, *own.values()], 1)), shard.dtype)


def _near(book: Book, shard: Shard, near: Near, own: dict[Cell, Tensor]) -> Tensor:
    """Add up each own average's scores over the keys that its queries read directly, ``[lists, averages]``."""
    grid, begin, sums = book.layout.grid, 0, [shard.k.new_empty(shard.lists, 0, dtype=shard.dtype)]
    for cell in (cell for cell in book.layout.queries if cell.rank == book.rank):
        if cell in own:
            sums.append(near_sums(near, begin, cell, grid, unpacked(own[cell], shard.dtype)))
        low, high = grid.local(cell)
        begin += high - low
    return torch.cat(sums, 1)


def _totals(world: World, book: Book, shard: Shard, asked: Tensor, near: Tensor) -> Tensor:
    """Add up the sums of all owners for every average, and of the keys near it; give those of the averages here."""
    layout, device = book.layout, shard.k.device
    own = [
        log_sums(shard, cell, _own_of(book, asked, chunk), shard.eligible(layout, chunk, cell)) for chunk, cell in book.pairs
    ]
    sums = torch.cat(own, 1) if own else asked.new_empty(shard.lists, 0)
    route = route_of("sums", world, book.inward, shard.lists, device)
    returned, totals, at = columns(world, route, sums[..., None])[..., 0], [], 0
    for cell in book.begins:
        owners = len(layout.owners(layout.grid.number(cell)))
        some = returned[:, at : at + owners * book.count(cell)].unflatten(1, (owners, -1))
        totals.append(some.double().logsumexp(1).to(shard.dtype))
        at += owners * book.count(cell)
    total = torch.logaddexp(torch.cat(totals, 1), near) if totals else asked.new_empty(shard.lists, 0)
    route = route_of("totals", world, book.outward, shard.lists, device)
    return columns(world, route, total[..., None])[..., 0]


def _told(world: World, book: Book, shard: Shard, sizes: Sizes, shares: list[Tensor]) -> Tensor:
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
    route = route_of("counts", world, book.forward, shard.lists, device)
    counts, decided, at = columns(world, route, x), [], 0
    for chunk in book.homed:
        part = counts[:, at : at + len(layout.owners(chunk))]
        decided.append(replies(part, sizes.num, sizes.even, shard.noise(chunk)))
        at += part.shape[1]
    answer = torch.cat(decided, 1) if decided else x.new_empty(shard.lists, 0, NUM_REPLY)
    route = route_of("replies", world, book.back, shard.lists, device)
    return columns(world, route, answer)


def _pools(world: World, book: Book, shard: Shard, sizes: Sizes, drawn: list[Drawn], told: Tensor) -> Choice:
    """Make the route of drawn keys into the pools, and send their chances along it."""
    layout, num, device = book.layout, sizes.num, shard.k.device
    lists = torch.arange(shard.lists, dtype=torch.int64, device=device)[:, None]
    send: list[list[Tensor]] = [[] for _ in range(world.size)]
    chance: list[list[Tensor]] = [[] for _ in range(world.size)]
    for each, (chunk, cell) in zip(drawn, book.pairs, strict=True):
        slot = torch.arange(each.index.shape[1], dtype=torch.int64, device=device)
        listed = slot < each.points[:, None]
        rows, chances = (lists * shard.k.shape[2] + cell.base + each.index)[listed], each.chance[listed]
        for rank in layout.holders(chunk):
            send[rank].append(rows)
            chance[rank].append(chances)
    owners = [(number, owner.rank) for number, chunk in enumerate(book.chunks) for owner in layout.owners(chunk)]
    number, rank = torch.tensor(owners, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
    # [lists, owners]
    first, points = told[:, len(book.pairs) :, -2:].long().unbind(2)
    start = lists * (len(book.chunks) * num) + number * num + first
    order = rank.argsort(stable=True)
    start, points = (x.T[order].flatten() for x in (start, points))
    place = spread(start, points, int(points.sum()))
    came = counted(rank[order].repeat_interleave(shard.lists), points, world.size)
    route = joined("pool", world, send, place.split(came), shard.lists * len(book.chunks) * num)
    own = [torch.cat(part) if part else told.new_empty(0) for part in chance]
    chances = torch.cat([*(x for at, x in enumerate(own) if at != world.rank), own[world.rank]])
    count = len(route.send)
    row = torch.arange(len(chances), dtype=torch.int64, device=device)
    weights = replace(route, purpose="weights", send=row[:count], kept=row[count:])
    found = world.move(weights, chances.to(shard.dtype)[:, None]).view(shard.lists, len(book.chunks), num)
    return Choice(book.chunks, route, (-found.log()).masked_fill(found == 0, -torch.inf))
