"""Queries grouped by what they look for: rows of a tile, sorted so that those of like direction stand together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.kernels.backend import grid_holds, triton_reads
from hyperattention.kernels.list.operator_sorted import merge_rows, sort_rows
from hyperattention.problem import Problem
from hyperattention.select.score.principal import principal_directions, random_directions
from hyperattention.tiling import Tiles
from hyperattention.types import Partial

# steps from the row farthest from the mean towards the direction in which rows differ most
POWER_STEPS = 2
# principal directions of a tile's rows in which they are compared: the others differ by little
DIRECTIONS = 16


@dataclass(frozen=True)
class AlikeTiles:
    """Tiles of queries that look for similar keys: rows of all heads of a group, out of one tile of positions.

    Args:
        source: the query in each row, counted over the heads of a group; padding rows repeat one.
        live: which rows are not padding.
        inside: place of each row in its tile of positions, one position after another, each with the heads of a group.
        shape: batch rows, heads and queries.
    """

    source: Int[Tensor, "lists tiles rows"]
    live: Bool[Tensor, "lists tiles rows"]
    inside: Int[Tensor, "lists tiles rows"]
    shape: tuple[int, int, int]

    @classmethod
    def joined(cls, parts: Sequence["AlikeTiles"]) -> "AlikeTiles":
        """Put the tiles of several parts behind one another."""
        source, live, inside = (
            torch.cat(x, 1) for x in zip(*((each.source, each.live, each.inside) for each in parts), strict=True)
        )
        return cls(source, live, inside, parts[0].shape)

    def arrange(self, x: Float[Tensor, "batch heads queries width"]) -> Float[Tensor, "lists tiles rows width"]:
        """Sort rows into tiles: on a GPU in one launch."""
        if grid_holds(len(self.source)) and triton_reads(x):
            return sort_rows(x, self.source, self.live)
        flat = x.reshape(len(self.source), -1, x.shape[-1])
        base = torch.arange(len(flat), dtype=torch.int64, device=x.device)[:, None, None] * flat.shape[1]
        # whole rows: one copy each
        return flat.flatten(0, 1).index_select(0, (self.source + base).flatten()).view(*self.source.shape, x.shape[-1])

    def restore(self, x: Tensor) -> Tensor:
        """Undo `arrange`, for rows of any width."""
        batch, heads, queries = self.shape
        lists, count = len(self.source), self.source[0].numel()
        number = torch.arange(lists, dtype=torch.int64, device=x.device)[:, None]
        each = batch * heads * queries // lists
        # padding rows meet in one place beyond all queries
        target = self.source.masked_fill(~self.live, each).flatten(1)
        place = target.new_empty(lists, each + 1)
        place.scatter_(1, target, torch.arange(count, dtype=torch.int64, device=x.device).expand(lists, -1))
        flat = x.flatten(0, 2).index_select(0, (place[:, :each] + number * count).flatten())
        return flat.view(batch, heads, queries, *x.shape[3:])

    def split(self, x: Float[Tensor, "batch heads queries width"]) -> Float[Tensor, "lists tiles 1 rows width"]:
        """Sort rows into tiles, in which heads are not told apart."""
        return self.arrange(x)[:, :, None]

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`."""
        return self.restore(x[:, :, 0])

    def beside(self, earlier: tuple[Partial, ...], out: Tensor, lse: Tensor) -> tuple[Partial, ...]:
        """Undo `split` for attention over the lists, and put it behind what is to be merged, or merge it in one launch."""
        if len(earlier) == 1 and grid_holds(len(out)) and triton_reads(out, earlier[0].out):
            rows = out[:, :, 0], lse[:, :, 0]
            return (Partial(*merge_rows(earlier[0].out, earlier[0].lse, rows, self.source, self.live)),)
        return *earlier, Partial(self.join(out), self.join(lse))


def sort_alike(
    tiles: Tiles,
    many: int,
    part: slice = slice(None),
    begin: Float[Tensor, "head_dim width"] | None = None,
    metric: Float[Tensor, "lists tiles head_dim head_dim"] | None = None,
) -> tuple[AlikeTiles, Float[Tensor, "lists tiles many rows head_dim"], Float[Tensor, "lists tiles many rows width"]]:
    """Cut every tile of positions into `many` tiles of alike queries.

    Rows are sorted along the direction in which they differ most, and cut into equal parts, which are cut again in the same
    way: a tree whose leaves are the tiles.

    Args:
        tiles: the problem tiled by position.
        many: tiles of alike queries for each tile of positions.
        part: which tiles of positions; all by default.
        begin: from `first_directions`, for a caller that sorts several parts; None draws them.
        metric: from `KeyMetric.of_tiles`, what the queries of each of these tiles are multiplied by before they are
            compared; None compares them as they are.

    Returns:
        the tiles; their queries, scaled, in float32 or wider; and these in the few directions in which they were compared.
    """
    problem = tiles.problem
    source, real = (x[part] for x in _rows(tiles))
    rows = source.shape[1]
    each = -(-rows // many)
    q = problem.q.unflatten(1, (-1, problem.group))
    # rows of these tiles alone are read, wherever the queries of a head lie
    x = q[:, :, source // problem.num_queries, source % problem.num_queries].flatten(0, 1)
    x = x.to(torch.promote_types(x.dtype, torch.float32)) * problem.scale
    # rows that fill up repeat the last one: they change no direction for the worse, and are thrown away
    fill = torch.arange(many * each, dtype=torch.int64, device=x.device).clamp(max=rows - 1)
    x = torch.nan_to_num(x.index_select(2, fill), nan=0.0, posinf=0.0, neginf=0.0)
    compared = x if metric is None else x @ metric.to(x.dtype)
    few = _compared(compared.flatten(0, 1), begin)
    order = _tree(few, _factors(many)).view(len(x), len(source), -1)
    shape = (len(x), len(source), many, each, -1)
    x, few = (_take(y, order.flatten(0, 1)).view(shape) for y in (x.flatten(0, 1), few))
    inside = order.clamp(max=rows - 1)
    index = torch.arange(len(source), dtype=torch.int64, device=x.device)[:, None] * rows + inside
    number, live = (y.flatten()[index].unflatten(2, (many, -1)).flatten(1, 2) for y in (source, real))
    live &= (order < rows).unflatten(2, (many, -1)).flatten(1, 2)
    heads = (problem.q.shape[0], problem.q.shape[1], problem.num_queries)
    return AlikeTiles(number, live, inside.unflatten(2, (many, -1)).flatten(1, 2), heads), x, few


def _rows(tiles: Tiles) -> tuple[Int[Tensor, "tiles rows"], Bool[Tensor, "tiles rows"]]:
    """Number the queries in each row of each tile, over the heads of a group; rows before the first repeat it, and so on."""
    problem, device = tiles.problem, tiles.problem.device
    row = torch.arange(len(tiles.index) * tiles.size, dtype=torch.int64, device=device).view(-1, tiles.size, 1) - tiles.front
    inside = row.clamp(0, problem.num_queries - 1)
    head = torch.arange(problem.group, dtype=torch.int64, device=device) * problem.num_queries
    # position by position: where rows are equal, as repeated ones are, the order is that of a single head
    return (inside + head).flatten(1), (inside == row).expand(-1, -1, problem.group).flatten(1)


def _factors(number: int) -> tuple[int, ...]:
    """Factor a number into primes, the smallest first."""
    factors, prime = (), 2
    while number > 1:
        while number % prime == 0:
            factors += (prime,)
            number //= prime
        prime += 1
    return factors


def first_directions(problem: Problem) -> Float[Tensor, "head_dim width"]:
    """Draw the directions from which `sort_alike` begins its search for those in which queries differ."""
    return random_directions(problem.q.shape[3], min(DIRECTIONS, problem.q.shape[3]), problem.device)


def _compared(
    x: Float[Tensor, "sets rows head_dim"], begin: Float[Tensor, "head_dim width"] | None
) -> Float[Tensor, "sets rows width"]:
    """Project the rows of every set onto the few directions in which they differ most."""
    if x.shape[2] <= DIRECTIONS:
        return x
    return (x - x.mean(1, keepdim=True)) @ principal_directions(x, DIRECTIONS, begin)


def _take(x: Float[Tensor, "sets rows width"], order: Int[Tensor, "sets rows"]) -> Float[Tensor, "sets rows width"]:
    """Bring the rows of every set into an order; whole rows are one copy each."""
    base = torch.arange(len(x), dtype=torch.int64, device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (order + base).flatten()).view_as(x)


def _tree(x: Float[Tensor, "sets rows width"], factors: tuple[int, ...]) -> Int[Tensor, "sets rows"]:
    """Sort each set along the direction in which it differs most, cut it into equal parts, and so on.

    Args:
        x: the rows.
        factors: parts of each cut; their product divides the rows.

    Returns:
        where each row stood.
    """
    sets, rows, width = x.shape
    order = torch.arange(rows, dtype=torch.int64, device=x.device).repeat(sets, 1)
    for parts in factors:
        off = x - x.mean(1, keepdim=True)
        farthest = off.square().sum(-1).argmax(1)
        axis = off.gather(1, farthest[:, None, None].expand(-1, 1, width)).transpose(1, 2)  # [sets, width, 1]
        for _ in range(POWER_STEPS):
            axis = torch.nn.functional.normalize(off.transpose(1, 2) @ (off @ axis), dim=1)
        place = (off @ axis)[..., 0].argsort(dim=-1, stable=True)
        order = order.gather(1, place).view(len(place) * parts, -1)
        x = _take(x, place).view(len(order), -1, width)
    return order.view(sets, rows)
