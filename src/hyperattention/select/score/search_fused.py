"""A hierarchical search as a GPU does it: one kernel for each step, and no number of blocks x tiles but their masses."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.kernels.choose.operator import block_lse, block_mass, prepare_keys, prepare_queries
from hyperattention.kernels.choose.operator_search import (
    draw_leaves,
    key_basis,
    open_blocks,
    represent,
    uniform_of_tiles,
)
from hyperattention.random import hash_state
from hyperattention.select.density import Distribution
from hyperattention.select.score.leaves import CLIP_ROUNDS, LEAST, Closed, Opened, leaves_of
from hyperattention.select.score.level import Level, first_level, opened_at
from hyperattention.select.score.pooling import seen_keys
from hyperattention.select.score.precision import dtype_of_estimates
from hyperattention.select.score.principal import ROUNDS
from hyperattention.select.score.walk import opened_across
from hyperattention.tiling import Tiles


@dataclass(frozen=True)
class _Blocks:
    """Blocks of one size, for a chunk of tiles.

    Args:
        first: first key of each, ``[lists, chunk, number]``; None for the leading blocks.
        number: how many there are.
        size: number of keys in each.
        mass: estimated weight of each; None before they are scored.
        alive: which of them are leaves; None before some are opened.
    """

    first: Tensor | None
    number: int
    size: int
    mass: Tensor | None = None
    alive: Tensor | None = None

    def listed(self, edges: Tensor) -> Tensor:
        """Return the first keys, for the leading blocks too."""
        if self.first is not None:
            return self.first
        first = torch.arange(self.number, dtype=torch.int64, device=edges.device) * self.size
        return first.expand(*edges.shape[:2], -1)


@dataclass(frozen=True)
class FusedLeaves(Distribution):
    """The distribution of `leaves_of`, from whose masses one kernel computes keys.

    Args:
        opened: keys of the blocks opened last.
        closed: blocks that are scored, from fine to coarse.
        edges: edges of the remaining keys.
        num: number of draws.
        uniform_share: share of the draws on closed blocks that is spread uniformly.
    """

    opened: _Blocks
    closed: tuple[_Blocks, ...]
    edges: Int[Tensor, "lists chunk 5"]
    num: int
    uniform_share: float

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Find leaf and key of evenly spaced points, of which only the first is read."""
        index = self.edges.new_empty((*self.edges.shape[:2], self.num))
        share = index.new_empty(index.shape, dtype=torch.float32)
        self._draw(point[..., 0] * self.num, (index, share), final=False)
        return index, share

    def write(self, noise: Float[Tensor, "lists chunk"], results: tuple[Tensor, Tensor]) -> None:
        """Write keys and log-weights; all remaining keys where they are no more than the draws.

        Args:
            noise: where inside its slot the first point lies.
            results: keys and log-weights, ``[lists, chunk, num]``.
        """
        self._draw(noise, results, final=True)

    def _draw(self, noise: Tensor, results: tuple[Tensor, Tensor], *, final: bool) -> None:
        nothing = self.edges.new_empty(0)
        draw_leaves(
            self.opened.first, self.opened.number, [nothing if x.first is None else x.first for x in self.closed],
            [x.mass for x in self.closed if x.mass is not None], [x.alive for x in self.closed if x.alive is not None],
            [x.size for x in self.closed], self.edges, noise, *results, self.uniform_share, CLIP_ROUNDS, LEAST, final,
        )  # fmt: skip

    def share(self, index: Tensor) -> Tensor:
        """Look up the leaf that holds each key."""
        key, left = self.opened.listed(self.edges), tuple(self.edges[..., at : at + 1] for at in range(4))
        begin, hole_begin, hole_end, end = left
        opened = Opened(key, ((key >= begin) & (key < hole_begin)) | ((key >= hole_end) & (key < end)))
        closed = [
            Closed(x.listed(self.edges), x.size, x.mass, x.alive.bool())
            for x in self.closed
            if x.mass is not None and x.alive is not None
        ]
        return leaves_of(opened, closed, left, self.num, self.uniform_share).share(index)


@dataclass(frozen=True)
class FusedSearch:
    """What a search reads, computed once for all tiles: see `walk.Walk`.

    Args:
        levels: levels from coarse to fine.
        tiles: the tiled problem.
        edges: edges of the remaining keys of all tiles.
        near: number of keys directly before each tile that earlier stages took.
        query: pooled queries, scaled.
        keys: centred and projected keys, in whole blocks, and one block of zeros.
        num: number of draws of each tile.
        uniform_share: share of the draws on closed blocks that is spread uniformly.
    """

    levels: tuple[Level, ...]
    tiles: Tiles
    edges: Int[Tensor, "lists tiles 5"]
    near: int
    query: Float[Tensor, "lists tiles rows width"]
    keys: Float[Tensor, "lists room width"]
    num: int
    uniform_share: float

    @cached_property
    def blocks(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the representatives of each level's blocks, and the moments of those of each possible first level."""
        summaries, moments, below, dtype = [], [], None, dtype_of_estimates(self.keys.device)
        begins = max(1, len(self.levels) - 1)
        for depth, level in reversed(list(enumerate(self.levels))):
            size, by, among = level.block_size, level.by, None
            # far keys of a coarse block come from those of its parts
            if below is not None and below[1].shape[2] * (size // below[0]) >= max(1, by.far) and below[1].shape[2]:
                among = below[1]
            summary, far, moment = represent(self.keys, among, size, by.means, by.far, depth < begins, dtype)
            summaries, moments, below = [summary, *summaries], [moment, *moments], (size, far)
        return tuple(summaries), tuple(moments)

    def law(self, part: slice) -> FusedLeaves:
        """Search for a chunk of tiles.

        Args:
            part: the chunk; no seam lies inside it.

        Returns:
            the distribution of the leaves.
        """
        (summaries, moments), edges, query = self.blocks, self.edges[:, part], self.query[:, part]
        keep, visible, closed = opened_at(self.levels, self.num), seen_keys(self.tiles, part), ()
        begin = first_level(self.levels, self.num, visible)
        size = self.levels[begin].block_size
        blocks = _Blocks(None, -(-visible // size), size)
        cut, nothing = blocks.number, self.keys.shape[1] - self.levels[0].block_size
        lse = block_lse(query, moments[begin], edges, blocks.number, size)
        for depth in range(begin, len(self.levels)):
            child = self.levels[depth + 1].block_size if depth + 1 < len(self.levels) else 1
            inside, by, first = size // child, self.levels[depth].by, blocks.first
            # only the first level skips blocks: see `Walk.law`
            if depth > begin or blocks.number > keep[depth]:
                given = query, summaries[depth], first, edges, lse, blocks.number, size, cut, by.means, by.far
                mass, kept = block_mass(*given), min(keep[depth], blocks.number)
                cut = opened_across(self.tiles, self.near, size, kept)
                alive, first = open_blocks(mass, first, edges, size, kept, cut, nothing, child)
                closed = (_Blocks(blocks.first, blocks.number, size, mass, alive), *closed)
                blocks, cut = _Blocks(first, kept * inside, child), cut * inside
            else:
                blocks = _Blocks(None, blocks.number * inside, child)
                cut = blocks.number
            size = child
        return FusedLeaves(blocks, closed, edges, self.num, self.uniform_share)


def prepared(
    tiles: Tiles, k: Tensor, num: int, width: int, room: int, pooled: int
) -> tuple[Float[Tensor, "lists room width"], Float[Tensor, "lists tiles rows width"]]:
    """Centre and project keys, pool and project queries: a launch for the directions, and one pass over each.

    Args:
        tiles: the tiled problem.
        k: keys, ``[lists, keys, head_dim]``.
        num: leading keys that tell their mean and the directions.
        width: directions on which keys are projected; keys as they are if these are no fewer than their numbers.
        room: keys of the result; those beyond `k` are zeros.
        pooled: averaged queries per tile and head.

    Returns:
        the keys, and the averages.
    """
    projects = width < k.shape[2]
    middle, basis = key_basis(k, num, width if projects else 0, 2 * ROUNDS, int(hash_state(())))
    return prepared_with(tiles, k, middle, basis if projects else None, room, pooled)


def prepared_with(
    tiles: Tiles, k: Tensor, middle: Tensor, basis: Tensor | None, room: int, pooled: int
) -> tuple[Tensor, Tensor]:
    """Do the same with a given mean and given directions.

    Args:
        tiles: the tiled problem.
        k: keys, ``[lists, keys, head_dim]``.
        middle: their mean, ``[lists, 1, head_dim]``.
        basis: directions, ``[lists, head_dim, width]``; None for keys as they are.
        room: keys of the result.
        pooled: averaged queries per tile and head.

    Returns:
        the keys, and the averages.
    """
    problem, dtype = tiles.problem, dtype_of_estimates(k.device)
    query = prepare_queries(
        problem.q, basis, dtype, len(tiles.index), 0, tiles.size, pooled, tiles.front, problem.k.shape[1], problem.scale
    )
    return prepare_keys(k, middle, basis, room), query


def noise_of(tiles: Tiles, begun: int) -> Float[Tensor, "lists tiles"]:
    """Tell where inside a slot the first of a tile's evenly spaced points lies, in one launch.

    Args:
        tiles: the tiled problem.
        begun: draws of the same tile that came before.

    Returns:
        numbers in [0, 1); the last counter is the number of draws before: see `Draw`.
    """
    problem = tiles.problem
    heads, (batch, kv_heads) = None if problem.heads is None else problem.head_index, problem.k.shape[:2]
    state = int(hash_state((problem.seed, problem.layer)))
    return uniform_of_tiles(heads, tiles.index, batch, kv_heads, state, begun)
