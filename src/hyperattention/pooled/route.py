"""Rows that move between ranks: what each sends, where each puts what it gets; and the world of a single rank."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """A linear map from the rows of a tensor on every rank to the rows of another one.

    Args:
        purpose: what moves, for reports and messages.
        send: for each rank, the rows that go there.
        place: for each rank, where the rows that come from there go.
        rows: rows of the result; those that nothing goes to are zeros.
    """

    purpose: str
    send: tuple[Int[Tensor, " _"], ...]
    place: tuple[Int[Tensor, " _"], ...]
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
        return x.new_zeros(route.rows, x.shape[1]).index_copy(0, route.place[0], x.index_select(0, route.send[0]))


@dataclass(frozen=True)
class Move:
    """Columns that one rank sends to another, of every list.

    Args:
        source: the rank that sends.
        start: first column.
        stop: end of the columns.
        target: the rank that receives.
        to: first column there.
    """

    source: int
    start: int
    stop: int
    target: int
    to: int


def route_of(
    purpose: str, world: World, moves: Iterable[Move], lists: int, widths: tuple[int, int], device: torch.device
) -> Route:
    """Make the route of columns that are moved for every list.

    Args:
        purpose: what moves.
        world: the ranks.
        moves: all moves, in the same order on every rank.
        lists: lists of columns; a tensor has ``lists * columns`` rows.
        widths: columns of this rank's tensor, and of the result.
        device: device of the tensors.

    Returns:
        the route.
    """
    send: list[list[Tensor]] = [[] for _ in range(world.size)]
    place: list[list[Tensor]] = [[] for _ in range(world.size)]
    for move in moves:
        if move.source == world.rank:
            send[move.target].append(_rows(lists, widths[0], move.start, move.stop, device))
        if move.target == world.rank:
            place[move.source].append(_rows(lists, widths[1], move.to, move.to + move.stop - move.start, device))
    return Route(purpose, joined(send, device), joined(place, device), lists * widths[1])


def _rows(lists: int, width: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Number the rows of some columns of every list."""
    column = torch.arange(start, stop, dtype=torch.int64, device=device)
    return (torch.arange(lists, dtype=torch.int64, device=device)[:, None] * width + column).flatten()


def joined(rows: list[list[Tensor]], device: torch.device) -> tuple[Int[Tensor, " _"], ...]:
    """Join the rows that go to, or come from, each rank.

    Args:
        rows: parts for each rank.
        device: device of the rows.

    Returns:
        one tensor for each rank.
    """
    return tuple(torch.cat(each) if each else torch.empty(0, dtype=torch.int64, device=device) for each in rows)


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
