"""Tiles of consecutive positions: the queries of a tile share one list of keys."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.problem import Problem
from hyperattention.types import Partial


@dataclass(frozen=True)
class Tiles:
    """Tiles whose edges lie at multiples of the tile size in absolute key positions, not relative to the call.

    A prompt that is cut at tile edges therefore gives the same tiles as the entire prompt, and each tile has the same draws.

    Args:
        problem: the queries that are tiled.
        size: positions in a tile.
        index: absolute number of each tile, the counter of its draws.
        start: live keys before the tile's first position.
        end: live keys at or before the tile's last position.
        total: live keys of the batch row.
        limit: leading keys that each row may see; 0 for padding.
    """

    problem: Problem
    size: int
    index: Int[Tensor, " tiles"]
    start: Int[Tensor, "batch tiles"]
    end: Int[Tensor, "batch tiles"]
    total: Int[Tensor, "batch 1"]
    limit: Int[Tensor, "batch tiles tile"]

    @property
    def front(self) -> int:
        """Padding rows before the first query, which align the queries to tile edges."""
        return self.problem.offset % self.size

    @property
    def visible_end(self) -> Int[Tensor, "batch tiles"]:
        """End of the keys that any row of the tile may see."""
        return self.end if self.problem.causal else self.total.expand_as(self.end)

    @property
    def known(self) -> Int[Tensor, "batch tiles"]:
        """Number of leading keys that all queries of each tile see: a choice made from these does not look ahead."""
        return self.start if self.problem.causal else self.visible_end

    def number(self, place: int) -> int:
        """Return the absolute number of a tile of this call, without reading from the device."""
        if self.problem.spans is not None:
            length, step = (positions // self.size for positions in self.problem.spans)
            place = place // length * step + place % length
        return self.problem.offset // self.size + place

    def before(self, number: int) -> int:
        """Count the tiles of this call with a smaller absolute number, as if the call had tiles without end."""
        ahead = max(0, number - self.problem.offset // self.size)
        if self.problem.spans is not None:
            length, step = (positions // self.size for positions in self.problem.spans)
            ahead = ahead // step * length + min(ahead % step, length)
        return ahead

    def within(self, num: int) -> int:
        """Count the leading tiles that may see no more than `num` keys: by position, without reading from the device."""
        if self.problem.rank is not None or self.problem.num_keys <= num:
            return len(self.index)
        return self.before(num // self.size + 1) if self.problem.causal else 0

    def leading(self, count: int) -> "Tiles":
        """Keep the first tiles, with their queries."""
        if count >= len(self.index):
            return self
        few = replace(self.problem, q=self.problem.q[:, :, : count * self.size - self.front])
        start, end, limit = (x[:, :count] for x in (self.start, self.end, self.limit))
        return replace(self, problem=few, index=self.index[:count], start=start, end=end, limit=limit)

    def by_list(self, x: Tensor) -> Tensor:
        """Repeat a tensor ``[batch, ...]`` for every batch row and kv head, without copying: ``[lists, ...]``."""
        batch, kv_heads = self.problem.k.shape[:2]
        return x[:, None].expand(batch, kv_heads, *x.shape[1:]).flatten(0, 1)

    def arrange(self, x: Float[Tensor, "batch heads queries width"]) -> Float[Tensor, "lists tiles rows width"]:
        """Cut rows into tiles and pack the heads of a group into one tile: row ``g * size + t`` is head g, position t."""
        return self.split(x).flatten(2, 3)

    def split(self, x: Float[Tensor, "batch heads queries width"]) -> Float[Tensor, "lists tiles group size width"]:
        """Cut rows into tiles as `arrange` does, but without copying where tiles are full."""
        batch, heads, count, width = x.shape
        tiles, group = len(self.index), self.problem.group
        x = pad(x, (0, 0, self.front, tiles * self.size - self.front - count)) if tiles * self.size != count else x
        return x.reshape(batch * (heads // group), group, tiles, self.size, width).transpose(1, 2)

    def restore(self, x: Tensor) -> Tensor:
        """Undo `arrange`, for rows of any width: ``[lists, tiles, rows, ...]`` to ``[batch, heads, queries, ...]``."""
        return self.join(x.unflatten(2, (self.problem.group, self.size)))

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`, for rows of any width; no copy if the memory is ordered by head."""
        batch, heads, count = self.problem.q.shape[:3]
        x = x.transpose(1, 2).reshape(batch, heads, len(self.index) * self.size, *x.shape[4:])
        return x[:, :, self.front : self.front + count]

    def beside(self, earlier: tuple[Partial, ...], out: Tensor, lse: Tensor) -> tuple[Partial, ...]:
        """Undo `split` for attention over the lists, and put it behind what is to be merged with it."""
        return *earlier, Partial(self.join(out), self.join(lse))


def cut(problem: Problem, size: int) -> Tiles:
    """Cut a problem's queries into tiles of `size` positions.

    Args:
        problem: the problem.
        size: positions in a tile.

    Returns:
        the tiles; the last tile may be partly empty, and so may the first one in a later chunk of a prompt. Queries in spans
        that are not multiples of this tile size are refused: see `check_spans`.
    """
    check_spans(problem, size)
    device, count = problem.device, problem.num_queries
    first, last = problem.offset // size, (problem.offset + count - 1) // size
    index = torch.arange(first, max(first, last + 1), dtype=torch.int64, device=device)
    if problem.spans is not None:
        index = problem.position[::size] // size
    position = index[:, None] * size + torch.arange(size, dtype=torch.int64, device=device)  # [tiles, tile]
    total = problem.live_before(torch.full((1,), problem.num_keys, dtype=torch.int64, device=device))
    start = problem.live_before(index * size)
    end = problem.live_before((index + 1) * size)
    limit = problem.live_before(position + 1) if problem.causal else total[:, :, None].expand(-1, *position.shape)
    row = torch.arange(index.shape[0] * size, dtype=torch.int64, device=device).view(-1, size) - problem.offset % size
    inside = (row >= 0) & (row < count)
    return Tiles(problem, size, index, start, end, total, limit.masked_fill(~inside, 0))


def check_spans(problem: Problem, size: int) -> None:
    """Check that spans of queries are complete tiles.

    Args:
        problem: the problem.
        size: positions in a tile.

    Raises:
        ValueError: if the queries are spans that are not multiples of this tile size.
    """
    if problem.spans is None:
        return
    length, step = problem.spans
    if length % size or step % size or problem.offset % size:
        raise ValueError(
            f"spans of {length} queries, {step} apart from position {problem.offset} on, are not complete tiles of "
            f"{size}: use multiples of the tile size"
        )
