"""A small summary of a chunk's queries: averages of alike queries, tile by tile."""

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.pooled.layout import Cell, Grid
from hyperattention.select.score.groups import grouped


def averages(
    q: Float[Tensor, "batch heads queries head_dim"], kv_heads: int, cell: Cell, grid: Grid, groups: int, scale: float
) -> Float[Tensor, "lists averages width"]:
    """Average the queries of each tile of a cell in groups, around those that are farthest from one another.

    Args:
        q: queries of the rank.
        kv_heads: kv heads.
        cell: the cell of queries.
        grid: the tiles.
        groups: groups of each tile; the queries of all heads of a group of heads share them.
        scale: factor of the scores.

    Returns:
        the averages, scaled, and behind each half the logarithm of its queries relative to the mean number (-inf for a group
        without queries), in the dtype of `q`: what travels is what a single rank uses as well.
    """
    begin = cell.start // grid.tile * grid.tile
    position = begin + torch.arange(grid.tiles(cell) * grid.tile, dtype=torch.int64, device=q.device)
    inside = position.clamp(cell.start, cell.stop - 1)
    x = q.index_select(2, inside - cell.start + cell.base).unflatten(1, (kv_heads, -1))
    # [lists, tiles, positions of a tile, group, head_dim]: position by position
    x = x.transpose(2, 3).flatten(0, 1).unflatten(1, (-1, grid.tile))
    x = torch.nan_to_num(x.to(torch.promote_types(q.dtype, torch.float32)) * scale, nan=0.0, posinf=0.0, neginf=0.0)
    live = (inside == position).view(-1, grid.tile, 1).expand(-1, -1, x.shape[3]).flatten(1).to(x.dtype)
    x, sets = x.flatten(2, 3), x.shape[:2]
    one_of = grouped(x.flatten(0, 1), groups).unflatten(0, sets) * live[..., None]
    count = one_of.sum(2)  # [lists, tiles, groups]
    mean = one_of.transpose(2, 3) @ x / count.clamp(min=1)[..., None]
    log_rows = (count / count.mean(2, keepdim=True)).log() * 0.5
    return torch.cat([mean, log_rows[..., None]], 3).flatten(1, 2).to(q.dtype)
