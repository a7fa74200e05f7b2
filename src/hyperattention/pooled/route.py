"""Rows that move between ranks: what each sends, where each puts what it gets; and the world of a single rank."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

# columns that travel together: the other rank, the first column, and how many
Run = tuple[int, int, int]


@dataclass(frozen=True)
class Route:
    """A linear map from the rows of a tensor on every rank to the rows of another one, as one rank sees it.

    Args:
        purpose: what moves, for reports and messages.
        send: rows that go to other ranks, by rank.
        sent: how many of them each rank gets; none this one.
        place: where rows that come from other ranks go, by rank.
        received: how many come from each rank; none from this one.
        kept: rows that stay on this rank.
        put: where those go.
        rows: rows of the result; those that nothing goes to are zeros.
    """

    purpose: str
    send: Int[Tensor, " sent"]
    sent: tuple[int, ...]
    place: Int[Tensor, " received"]
    received: tuple[int, ...]
    kept: Int[Tensor, " kept"]
    put: Int[Tensor, " kept"]
    rows: int


class World(ABC):
    """The ranks that share a sequence."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Number of this rank."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many ranks there are."""

    @abstractmethod
    def move(self, route: Route, x: Shaped[Tensor, "rows width"]) -> Shaped[Tensor, "moved width"]:
        """Send rows, and receive others; every rank takes part."""


@dataclass(frozen=True)
class Alone(World):
    """One rank that holds the entire sequence."""

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return 0

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return 1

    def move(self, route: Route, x: Shaped[Tensor, "rows width"]) -> Shaped[Tensor, "moved width"]:
        """Copy rows, with a gradient."""
        return x.new_zeros(route.rows, x.shape[1]).index_copy(0, route.put, x.index_select(0, route.kept))


@dataclass(frozen=True)
class Moves:
    """Columns that one rank sends and receives, of every list. Both ends name the runs between two ranks in one order.

    Args:
        send: runs of this rank's columns, by the rank that gets them.
        place: runs of columns of the result, by the rank that they come from.
        widths: columns of this rank's tensor, and of the result.
    """

    send: Int[Tensor, "sent 3"]
    place: Int[Tensor, "received 3"]
    widths: tuple[int, int]

    @classmethod
    def of(cls, send: Iterable[Run], place: Iterable[Run], widths: tuple[int, int]) -> "Moves":
        """Sort runs by the other rank.

        Args:
            send: runs that are sent, in the order in which they travel to one rank.
            place: runs that are received, in the order in which they come from one rank.
            widths: columns of this rank's tensor, and of the result.

        Returns:
            the moves.
        """
        return cls(_sorted(send), _sorted(place), widths)


def _sorted(runs: Iterable[Run]) -> Int[Tensor, "runs 3"]:
    return torch.tensor(sorted(runs, key=lambda run: run[0]), dtype=torch.int64, device="cpu").view(-1, 3)


def route_of(purpose: str, world: World, moves: Moves, lists: int, device: torch.device) -> Route:
    """Make the route of columns that are moved for every list.

    Args:
        purpose: what moves.
        world: the ranks.
        moves: what this rank sends and receives.
        lists: lists of columns; a tensor has ``lists * columns`` rows.
        device: device of the tensors.

    Returns:
        the route.
    """
    sides = []
    for runs, width in zip((moves.send, moves.place), moves.widths, strict=True):
        own = runs[:, 0] == world.rank
        others = runs[~own]
        sides += [_rows(others, lists, width, device), counted(others[:, 0], others[:, 2] * lists, world.size)]
        sides.append(_rows(runs[own], lists, width, device))
    send, sent, kept, place, received, put = sides
    return Route(purpose, send, sent, place, received, kept, put, lists * moves.widths[1])


def counted(rank: Int[Tensor, " runs"], rows: Int[Tensor, " runs"], ranks: int) -> tuple[int, ...]:
    """Add up rows by rank.

    Args:
        rank: the rank of each run.
        rows: rows of each run.
        ranks: how many ranks there are.

    Returns:
        rows of each rank.
    """
    return tuple(rows.new_zeros(ranks).index_add_(0, rank, rows).tolist())


def _rows(runs: Int[Tensor, "runs 3"], lists: int, width: int, device: torch.device) -> Int[Tensor, " rows"]:
    """Number the rows of some columns of every list, run by run."""
    start = runs[:, 1, None] + torch.arange(lists, dtype=torch.int64, device=runs.device) * width
    count = runs[:, 2, None].expand(-1, lists)
    return spread(start.flatten().to(device), count.flatten().to(device), int(count.sum()))


def spread(start: Int[Tensor, " ranges"], count: Int[Tensor, " ranges"], total: int) -> Int[Tensor, " total"]:
    """List the numbers of ranges.

    Args:
        start: first number of each range.
        count: numbers of each range.
        total: numbers of all ranges; given, so that no device is waited for.

    Returns:
        the numbers, range by range.
    """
    before = start - (count.cumsum(0) - count)
    return before.repeat_interleave(count, output_size=total) + torch.arange(total, dtype=torch.int64, device=start.device)


def joined(purpose: str, world: World, send: Sequence[Sequence[Tensor]], place: Sequence[Tensor], rows: int) -> Route:
    """Make a route of rows that are known by rank.

    Args:
        purpose: what moves.
        world: the ranks.
        send: parts of the rows that go to each rank.
        place: where the rows that come from each rank go.
        rows: rows of the result.

    Returns:
        the route.
    """
    own, nothing = world.rank, place[world.rank][:0]
    away = [torch.cat([nothing, *each]) for each in send]
    others = [rank for rank in range(world.size) if rank != own]
    sent, received = ([0 if rank == own else len(each) for rank, each in enumerate(side)] for side in (away, place))
    goes, comes = (torch.cat([nothing, *(side[rank] for rank in others)]) for side in (away, place))
    return Route(purpose, goes, tuple(sent), comes, tuple(received), away[own], place[own], rows)


def columns(world: World, route: Route, x: Shaped[Tensor, "lists columns width"]) -> Shaped[Tensor, "lists moved width"]:
    """Move columns of every list along a route of `route_of`.

    Args:
        world: the ranks.
        route: the route.
        x: the columns.

    Returns:
        the columns received.
    """
    return world.move(route, x.flatten(0, 1)).view(x.shape[0], route.rows // max(1, x.shape[0]), x.shape[2])
