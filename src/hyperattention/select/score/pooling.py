"""Inputs of every tile score: pooled queries, edges of the remaining keys, and a coarse choice of panels."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.check import positive
from hyperattention.select.stage import CoveredKeys, Edges
from hyperattention.tiling import Tiles

# scores and gathered summaries of one chunk of tiles: small enough for the last-level cache
SCORE_BYTES = 24 * 2**20
# on any other device fewer, larger operations are faster; this bounds the memory of selection there
DEVICE_SCORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Coarse:
    """A first, coarser choice: only keys inside the `num` best panels of `panel_size` keys are scored one by one.

    Panels are ranked by `KeyBounds`, in the projection of the finer score.

    Args:
        num: number of panels chosen for each tile.
        panel_size: number of keys in a panel.

    Raises:
        ValueError: if a number is not positive.
    """

    num: int = 32
    panel_size: int = 128

    def __post_init__(self) -> None:
        positive("Coarse", num=self.num, panel_size=self.panel_size)

    @property
    def keys(self) -> int:
        """Number of keys in the panels chosen for each tile."""
        return self.num * self.panel_size

    def products(self, visible: float) -> float:
        """Count short products spent on the choice, for one pooled query."""
        return 2 * visible / self.panel_size

    def choose(self, score: Tensor, left: tuple[Tensor, ...]) -> Tensor:
        """Choose the best panels that hold a remaining key, ascending.

        Args:
            score: ``[lists, tiles, panels]``.
            left: edges of the remaining keys, from `edges`.

        Returns:
            ``[lists, tiles, min(num, panels)]``.
        """
        first = torch.arange(score.shape[2], dtype=torch.int64, device=score.device) * self.panel_size
        allowed = any_left(first, self.panel_size, left)
        score = torch.nan_to_num(score, nan=0.0).masked_fill(~allowed, -torch.inf)
        score = score.masked_fill(allowed & beyond(first, self.panel_size, left), torch.inf)
        return score.topk(min(self.num, score.shape[2]), dim=-1)[1].sort(-1)[0]


def pool_queries(tiles: Tiles, pooled: int, scale: float | None = None) -> Tensor:
    """Average neighbouring queries of each head in `pooled` groups per tile: ``[lists, tiles, group * pooled, head_dim]``.

    Args:
        tiles: the tiled problem.
        pooled: number of groups.
        scale: factor of the averages, which are then float32 or wider; None for no factor, in the dtype of the queries.

    Returns:
        the averages.
    """
    problem, count, size = tiles.problem, len(tiles.index), tiles.size
    each = -(-size // min(pooled, size))
    groups = -(-size // each)
    ragged = count * size - problem.num_queries
    # padding rows are zeros: they add nothing, and are not counted
    q = pad(problem.q, (0, 0, tiles.front, ragged - tiles.front)) if ragged else problem.q
    q = q.unflatten(2, (count, size))
    q = pad(q, (0, 0, 0, groups * each - size)) if groups * each != size else q
    total = q.unflatten(3, (groups, each)).sum(4)  # [batch, heads, tiles, groups, head_dim]
    slot = torch.arange(groups * each, dtype=torch.int64, device=q.device)
    row = torch.arange(count, dtype=torch.int64, device=q.device)[:, None] * size + slot - tiles.front
    there = (row >= 0) & (row < problem.num_queries) & (slot < size)
    number = there.view(count, groups, each).sum(2).clamp(min=1)[..., None]
    wide = torch.promote_types(total.dtype, torch.float32)
    dtype = total.dtype if scale is None else wide
    # one pass over memory for the average, the factor and the wider dtype
    total = (
        total.unflatten(1, (-1, problem.group)).transpose(2, 3).contiguous()
    )  # [batch, kv_heads, tiles, group, groups, _]
    mean = total * ((1.0 if scale is None else scale) / number[:, None].to(wide)).to(dtype)
    return mean.flatten(3, 4).flatten(0, 1)


def edges(tiles: Tiles, covered: CoveredKeys) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the edges of the remaining keys, ``[lists, tiles, 1]`` each: begin, hole begin, hole end, end."""
    if covered.edges is not None:
        of_tile = covered.edges.of_tile
        return of_tile[..., 0:1], of_tile[..., 1:2], of_tile[..., 2:3], of_tile[..., 3:4]
    begin, hole_begin, hole_end, end = (tiles.by_list(x)[..., None] for x in covered.bounds(tiles))
    return begin, hole_begin, hole_end, end


def edges_of(tiles: Tiles, covered: CoveredKeys) -> Edges:
    """Return the same for kernels, with the end of the keys that all queries of a tile see."""
    if covered.edges is not None:
        return covered.edges
    left = edges(tiles, covered)
    return Edges(torch.cat([*left, tiles.by_list(tiles.known)[..., None]], 2), left[0][..., 0], left[3][..., 0])


def any_left(first: Tensor, size: int, left: tuple[Tensor, ...]) -> Tensor:
    """Return which runs of `size` keys hold a remaining key."""
    begin, hole_begin, hole_end, end = left
    until = first + size
    return (torch.minimum(until, hole_begin) > torch.maximum(first, begin)) | (
        torch.minimum(until, end) > torch.maximum(first, hole_end)
    )


def beyond(first: Tensor, size: int, left: tuple[Tensor, ...]) -> Tensor:
    """Return which runs of `size` keys extend beyond the tile: they are chosen without a score, to avoid look-ahead."""
    return first + size > left[3]


def seen_keys(tiles: Tiles, part: slice) -> int:
    """Bound the number of keys that a chunk of tiles can see, by position, without reading from the device."""
    problem = tiles.problem
    if not problem.causal:
        return problem.num_keys
    return min(problem.num_keys, max(1, (tiles.number(part.stop - 1) + 1) * tiles.size))


def score_bytes(device: torch.device) -> int:
    """Return how much memory a chunk's numbers may take."""
    return SCORE_BYTES if device.type == "cpu" else DEVICE_SCORE_BYTES


def chunks(tiles: Tiles, numbers: int, seams: Sequence[int] = ()) -> list[slice]:
    """Cut the tiles at `seams`, and so that `numbers` float32 numbers per list and tile fit the device's bound."""
    lists = tiles.problem.k.shape[0] * tiles.problem.k.shape[1]
    step = max(1, score_bytes(tiles.problem.device) // max(1, 4 * lists * numbers))
    total = len(tiles.index)
    sides = pairwise(sorted({0, total, *(seam for seam in seams if seam < total)}))
    return [slice(at, min(at + step, end)) for begin, end in sides for at in range(begin, end, step)]
