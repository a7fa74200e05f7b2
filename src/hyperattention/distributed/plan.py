"""Who computes what in one call, and the routes of all that moves; made alike on every rank from the lengths alone."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hyperattention.distributed.align import aligned, held, moves_between
from hyperattention.distributed.group import Group
from hyperattention.distributed.numbers import number_of
from hyperattention.distributed.order import Segment
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.methods.pooled_chunks import PooledChunks
from hyperattention.pooled.layout import Cell, Grid, Layout, cut
from hyperattention.pooled.pool import Sizes
from hyperattention.pooled.route import Moves, Route, World, route_of
from hyperattention.select.stage import LookAhead


@dataclass(frozen=True)
class Way:
    """How a method runs on several ranks.

    Args:
        method: the method over the keys that a cell of queries reads directly.
        pooled: the method whose pools hold the other keys; None if every key is read directly.
        tile: positions whose queries must be on one rank: a tile, or a block of averaged queries.
    """

    method: AttentionMethod
    pooled: PooledChunks | None
    tile: int

    def grid(self, num_keys: int, causal: bool) -> Grid:
        """Return how a sequence is cut into chunks: a single one if every key is read directly."""
        if self.pooled is not None:
            return self.pooled.grid(num_keys, causal)
        return Grid(max(1, num_keys), 0, self.tile, num_keys, causal)

    @property
    def sizes(self) -> Sizes | None:
        """The sizes of pools; None without pools."""
        return None if self.pooled is None else self.pooled.sizes


def way_of(method: object, gather: bool) -> Way:
    """Decide how a method runs.

    Args:
        method: the method.
        gather: whether keys and values of all ranks are gathered.

    Returns:
        the way.

    Raises:
        TypeError: if it is no method.
        NotImplementedError: if the method needs keys that would have to be gathered, or all queries of the sequence.
    """
    if not isinstance(method, AttentionMethod):
        raise TypeError(f"method={method!r}: it must be a method, such as PooledChunks()")
    if isinstance(method, PooledChunks) and not gather:
        return Way(method.local, method, method.positions)
    if not gather:
        raise NotImplementedError(
            f"method={method!r} may read any key of any rank, so all keys and values would have to move: pass gather=True "
            "if that is meant, or a PooledChunks(...), which moves a bounded number of keys"
        )
    if method.looks_ahead == LookAhead.SEQUENCE or not isinstance(method, Method | Exact):
        raise NotImplementedError(
            f"method={method!r} cannot run on some queries of a sequence, as every rank would with gather=True: use "
            "Exact(), a Method(...) of stages that look at their own tile and earlier tokens, or PooledChunks(...) "
            "without gather"
        )
    return Way(method, None, method.tile if isinstance(method, Method) else 1)


@dataclass(frozen=True)
class Plan:
    """The cells of a call, and the routes that bring tokens there.

    Args:
        layout: who holds which tokens once tiles are whole.
        cells: this rank's cells, by position.
        tokens: tokens of this rank once tiles are whole.
        moved: moves that make tiles whole; None if they are.
        number: tells plans apart; ranks that share a plan have the same.
    """

    layout: Layout
    cells: tuple[Cell, ...]
    tokens: int
    moved: Moves | None
    number: int

    @classmethod
    def of(cls, world: World, way: Way, segments: list[list[Segment]], causal: bool) -> "Plan":
        """Plan a call; a plan of the same shards is made once.

        Args:
            world: the ranks.
            way: how the method runs.
            segments: what each rank holds.
            causal: whether queries see only earlier keys.

        Returns:
            the plan.
        """
        total = sum(stop - start for own in segments for start, stop in own)
        return _planned(world.rank, way.tile, way.grid(total, causal), tuple(map(tuple, segments)))

    def align(self, group: Group, x: Tensor, purpose: str) -> "Aligned":
        """Bring a tensor ``[batch, heads, tokens, width]`` into whole tiles."""
        if self.moved is None:
            return Aligned(x, None)
        lists = x.shape[0] * x.shape[1]
        route = route_of(f"{purpose} of cut tiles", group, self.moved, lists, group.device)
        rows = group.move(route, x.reshape(-1, x.shape[3]))
        return Aligned(rows.view(*x.shape[:2], self.tokens, x.shape[3]), route)

    def restore(self, group: Group, x: Tensor, route: Route | None, purpose: str) -> Tensor:
        """Undo `align`, for rows of any width; of gradients as well."""
        if route is None or self.moved is None:
            return x
        width = self.moved.widths[0]
        rows = group.move_back(route, f"{purpose} of cut tiles", x.reshape(-1, x.shape[3]), x.shape[0] * x.shape[1] * width)
        return rows.view(*x.shape[:2], width, x.shape[3])


@lru_cache(maxsize=16)
def _planned(rank: int, tile: int, grid: Grid, segments: tuple[tuple[Segment, ...], ...]) -> Plan:
    whole = aligned(segments, tile)
    before, after = held(segments), held(whole)
    cells = cut([(cell.rank, cell.start, cell.stop, cell.base) for cell in after], grid.chunk)
    own = tuple(cell for cell in cells if cell.rank == rank)
    moved = None if before == after else moves_between(before, after, rank)
    return Plan(
        Layout(grid, cells, cells), own, sum(cell.size for cell in own), moved, number_of(repr((tile, grid, segments)))
    )


@dataclass(frozen=True)
class Aligned:
    """A tensor in whole tiles, and the route that brought it there; None if it was whole."""

    x: torch.Tensor
    route: Route | None
