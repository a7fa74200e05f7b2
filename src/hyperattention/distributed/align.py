"""Whole tiles for every rank: a tile that several ranks share goes to the one that holds its first token."""

from collections.abc import Sequence

from hyperattention.distributed.order import Segment
from hyperattention.pooled.layout import Cell, parts
from hyperattention.pooled.route import Moves


def held(segments: Sequence[Sequence[Segment]]) -> tuple[Cell, ...]:
    """Return the cells of what ranks hold, by position.

    Args:
        segments: segments of each rank, in the order of its rows.

    Returns:
        one cell for each segment.
    """
    cells = []
    for rank, own in enumerate(segments):
        base = 0
        for start, stop in own:
            cells.append(Cell(rank, start, stop, base))
            base += stop - start
    return tuple(sorted(cells, key=lambda cell: cell.start))


def aligned(segments: Sequence[Sequence[Segment]], tile: int) -> list[list[Segment]]:
    """Move the edges of segments to the next edges of tiles.

    Args:
        segments: segments of each rank.
        tile: positions in a tile.

    Returns:
        segments of whole tiles, but for the last one of the sequence.
    """
    total = max((stop for own in segments for _, stop in own), default=0)
    moved = [[(_up(start, tile), min(total, _up(stop, tile))) for start, stop in own] for own in segments]
    return [[(start, stop) for start, stop in own if start < stop] for own in moved]


def _up(position: int, tile: int) -> int:
    return -(-position // tile) * tile


def moves_between(source: Sequence[Cell], target: Sequence[Cell], rank: int) -> Moves:
    """List what a rank sends and receives when tokens change hands.

    Args:
        source: who holds tokens before, by position.
        target: who holds them afterwards, by position.
        rank: the rank.

    Returns:
        the moves, what stays on the rank among them.
    """
    before, after = ([cell for cell in cells if cell.rank == rank] for cells in (source, target))
    send = [
        (to.rank, cell.base + low - cell.start, high - low)
        for cell in before
        for to, low, high in parts(target, cell.start, cell.stop)
    ]
    place = [
        (cell.rank, to.base + low - to.start, high - low)
        for to in after
        for cell, low, high in parts(source, to.start, to.stop)
    ]
    return Moves.of(send, place, (sum(cell.size for cell in before), sum(cell.size for cell in after)))
