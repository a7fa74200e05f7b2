"""What a pool is made with: the numbers of a call, and the keys that a rank holds."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.pooled.layout import Cell, Layout
from hyperattention.pooled.route import Route
from hyperattention.random import uniform

# counters that tell the points of a pool from all other draws
_POOL = (1, 1)


@dataclass(frozen=True)
class Sizes:
    """The sizes of pools.

    Args:
        num: slots of each pool.
        groups: averages of each block of queries.
        sinks: leading live keys that are always listed.
        even: share of the draws that is spread evenly.
    """

    num: int
    groups: int
    sinks: int
    even: float


@dataclass(frozen=True)
class Shard:
    """The tokens of one rank.

    Args:
        q: queries.
        k: keys.
        live: which keys may be attended to; None for all.
        before: live keys before the first key of each own cell of keys, ``[cells, batch]``; None where all are live.
        scale: factor of the scores.
        seed: seed of every draw.
        layer: layer of the model.
        head_index: index of every kv head in the model's layer.
    """

    q: Float[Tensor, "batch heads queries head_dim"]
    k: Float[Tensor, "batch kv_heads keys head_dim"]
    live: Bool[Tensor, "batch keys"] | None
    before: Int[Tensor, "cells batch"] | None
    scale: float
    seed: int
    layer: int
    head_index: Int[Tensor, " kv_heads"]

    @property
    def lists(self) -> int:
        """Lists of keys: one for each batch row and kv head."""
        return self.k.shape[0] * self.k.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which scores are computed."""
        return torch.promote_types(self.k.dtype, torch.float32)

    def noise(self, chunk: int) -> Float[Tensor, " lists"]:
        """Tell where inside a slot the points of a chunk's pools lie."""
        at = uniform((self.seed, self.layer, self.head_index, chunk, *_POOL), self.k.device)
        return at.repeat(self.k.shape[0])

    def eligible(self, layout: Layout, chunk: int, cell: Cell) -> Bool[Tensor, "lists keys"]:
        """Return which keys of an own cell a chunk reads only through its pool."""
        grid = layout.grid
        position = torch.arange(cell.start, cell.stop, dtype=torch.int64, device=self.k.device)
        far = position < grid.low(chunk)
        if not grid.causal:
            far |= position >= grid.high(chunk)
        if self.live is None:
            return far.expand(self.lists, -1)
        live = self.live[:, cell.base : cell.base + cell.size] & far
        return live.repeat_interleave(self.k.shape[1], 0)

    def certain(self, sinks: int, number: int, cell: Cell) -> Bool[Tensor, "lists keys"]:
        """Return which keys of an own cell, the cell number `number`, are among the first live ones."""
        if self.live is None or self.before is None:
            position = torch.arange(cell.start, cell.stop, dtype=torch.int64, device=self.k.device)
            return (position < sinks).expand(self.lists, -1)
        rank = self.live[:, cell.base : cell.base + cell.size].cumsum(1) + self.before[number][:, None]
        return (rank <= sinks).repeat_interleave(self.k.shape[1], 0)


@dataclass(frozen=True)
class Near:
    """The keys that a rank's queries read directly, cell by cell.

    Args:
        k: the keys, in the order of `near_route`.
        live: which of them may be attended to; None for all.
    """

    k: Float[Tensor, "batch kv_heads near head_dim"]
    live: Bool[Tensor, "batch near"] | None


@dataclass(frozen=True)
class Choice:
    """The pools of a rank's chunks.

    Args:
        chunks: chunks of which the rank holds queries and that have a pool, in order.
        route: how keys and values reach the pools, ``lists * chunks * num`` rows.
        log_weight: log-weights of the slots; -inf for an empty one.
    """

    chunks: tuple[int, ...]
    route: Route
    log_weight: Float[Tensor, "lists chunks num"]
