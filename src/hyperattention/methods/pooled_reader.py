"""Attention of a rank's queries: over the keys near their chunk by a method, over their pool exactly, merged."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hyperattention.coreset import Coreset
from hyperattention.merge import merge
from hyperattention.methods.base import AttentionMethod
from hyperattention.pooled.layout import Cell, Layout, parts
from hyperattention.pooled.pool import Choice
from hyperattention.pooled.route import Moves, Route, Run, World, route_of
from hyperattention.problem import Problem, compact
from hyperattention.random import SEED_LIMIT
from hyperattention.types import Partial

# odd, so that no two chunks of a sequence draw with one seed
_SEED_STEP = 0x9E3779B97F4A7C15


def near_route(world: World, layout: Layout, lists: int, device: torch.device) -> Route:
    """Make the route of the keys that each cell of queries reads directly: cell by cell, by position.

    Args:
        world: the ranks.
        layout: who holds which tokens.
        lists: lists of keys.
        device: device of the keys.

    Returns:
        the route.
    """
    return route_of("near", world, _near_moves(layout, world.rank), lists, device)


@lru_cache(maxsize=32)
def _near_moves(layout: Layout, rank: int) -> Moves:
    own = layout.keys_of(rank)
    send: list[Run] = []
    place: list[Run] = []
    got = 0
    for query in layout.queries:
        near = layout.grid.local(query)
        for cell, low, high in parts(own, *near):
            send.append((query.rank, cell.base + low - cell.start, high - low))
        if query.rank == rank:
            for cell, low, high in parts(layout.keys, *near):
                place.append((cell.rank, got, high - low))
                got += high - low
    return Moves.of(send, place, (sum(cell.size for cell in own), got))


@dataclass(frozen=True)
class Reader:
    """What a rank computes once all keys are there.

    Args:
        layout: who holds which tokens.
        cells: this rank's cells of queries, by position.
        method: the method over the keys near a chunk.
        problem: numbers of the call; its tensors are not read.
        choice: the pools; None if there is none.
    """

    layout: Layout
    cells: tuple[Cell, ...]
    method: AttentionMethod
    problem: Problem
    choice: Choice | None

    def attend(
        self,
        q: Float[Tensor, "batch heads queries head_dim"],
        near: Float[Tensor, "batch kv_heads near width"],
        pool: Float[Tensor, "batch kv_heads pooled width"] | None,
        live: Bool[Tensor, "batch near"] | None,
    ) -> Partial:
        """Compute attention of every query of this rank.

        Args:
            q: the queries, in the order of the rank.
            near: keys beside values, from `near_route`.
            pool: keys beside values, from the route of the choice.
            live: which keys near a chunk may be attended to; None for all.

        Returns:
            rows in the order of the queries.
        """
        sizes = [high - low for low, high in map(self.layout.grid.local, self.cells)]
        begins = accumulate(sizes, initial=0)
        found = [
            self._cell(q, cell, near[:, :, at : at + size], None if live is None else live[:, at : at + size], pool)
            for cell, at, size in zip(self.cells, begins, sizes, strict=False)
        ]
        order = sorted(range(len(self.cells)), key=lambda number: self.cells[number].base)
        return _joined(q, near.shape[3] - q.shape[3], [found[number] for number in order])

    def _cell(self, q: Tensor, cell: Cell, near: Tensor, live: Tensor | None, pool: Tensor | None) -> Partial:
        """Compute attention of a cell of queries."""
        width, chunk = q.shape[3], self.layout.grid.number(cell)
        rows = q[:, :, cell.base : cell.base + cell.size]
        offset = cell.start - self.layout.grid.low(chunk)
        seed = (self.problem.seed + chunk * _SEED_STEP) % SEED_LIMIT if self.choice is not None else self.problem.seed
        k, v = near[..., :width], near[..., width:]
        problem = replace(self.problem, q=rows, k=k, v=v, offset=offset, seed=seed, rank=None, key_mask=None)
        if live is not None and self.method.follows_masks:
            problem = replace(problem, key_mask=live)
        elif live is not None:
            k, v, rank = compact(k, v, live)
            problem = replace(problem, k=k, v=v, rank=rank)
        found = self.method.attend(problem)
        if self.choice is None or pool is None or chunk not in self.choice.chunks:
            return found
        number, num = self.choice.chunks.index(chunk), self.choice.log_weight.shape[2]
        listed = pool[:, :, number * num : (number + 1) * num]
        weight = self.choice.log_weight[:, number].unflatten(0, pool.shape[:2])
        drawn = Coreset(listed[..., :width], listed[..., width:], weight).attend(rows, scale=self.problem.scale)
        return merge([found, drawn])


def _joined(q: Tensor, value_dim: int, found: Sequence[Partial]) -> Partial:
    if not found:
        acc = torch.promote_types(q.dtype, torch.float32)
        return Partial(q.new_empty(*q.shape[:3], value_dim), q.new_empty(q.shape[:3], dtype=acc))
    return Partial(torch.cat([x.out for x in found], 2), torch.cat([x.lse for x in found], 2))
