"""A small summary of a chunk's queries: averages of alike queries, block by block, as bytes."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hyperattention.pooled.layout import Cell, Grid
from hyperattention.pooled.pool import Shard
from hyperattention.select.score.groups import grouped
from hyperattention.select.score.key_metric import factor_of
from hyperattention.select.score.pooling import score_bytes

# numbers of an average travel in 8 bits, relative to the largest; behind them two of 16 bits. Integers would not do: a
# channel of large numbers, in which all keys are alike, would leave few steps to those that matter
_KINDS = torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
# numbers of 32 bits that are held for each row and group
_COPIES = 4


def averages(
    shard: Shard, grid: Grid, keys: Sequence[Cell], cell: Cell, groups: int
) -> UInt8[Tensor, "lists averages bytes"]:
    """Average the queries of each block of a cell in groups, around those that are farthest from one another.

    How far two queries are from one another is how much their scores differ over the keys of their block: the distance in
    the metric of these keys' covariance.

    Args:
        shard: the rank's tokens.
        grid: the blocks.
        keys: the rank's cells of keys.
        cell: the cell of queries.
        groups: groups of each block; the queries of all heads of a group of heads share them.

    Returns:
        the averages, packed: what travels is what a single rank uses as well.
    """
    # of a block: rows, each as numbers of its group, a few times
    size = grid.tile * shard.q.shape[1] * shard.q.shape[0] * (_COPIES * groups + shard.q.shape[3])
    step = max(1, score_bytes(shard.q.device) // (4 * size)) * grid.tile
    position = _positions(grid, cell, shard.q.device)
    parts = [_grouped(shard, grid, keys, cell, some, groups) for some in position.split(step)]
    return torch.cat(parts, 1)


def _grouped(
    shard: Shard, grid: Grid, keys: Sequence[Cell], cell: Cell, position: Int[Tensor, " positions"], groups: int
) -> UInt8[Tensor, "lists averages bytes"]:
    """Average the queries at the positions of some blocks."""
    kv_heads = shard.k.shape[1]
    inside = position.clamp(cell.start, cell.stop - 1)
    x = shard.q.index_select(2, inside - cell.start + cell.base).unflatten(1, (kv_heads, -1))
    # [lists, blocks, positions of a block, group, head_dim]: position by position
    x = x.transpose(2, 3).flatten(0, 1).unflatten(1, (-1, grid.tile))
    x = torch.nan_to_num(x.to(shard.dtype) * shard.scale, nan=0.0, posinf=0.0, neginf=0.0)
    live = (inside == position).view(-1, grid.tile, 1).expand(-1, -1, x.shape[3]).flatten(1).to(x.dtype)
    x, sets = x.flatten(2, 3), x.shape[:2]
    scored = x @ _factors(shard, grid, keys, cell, position)
    one_of = grouped(scored.flatten(0, 1), groups).unflatten(0, sets) * live[..., None]
    count = one_of.sum(2)  # [lists, blocks, groups]
    mean = one_of.transpose(2, 3) @ x / count.clamp(min=1)[..., None]
    log_rows = (count / count.mean(2, keepdim=True)).log() * 0.5
    return packed(mean.flatten(1, 2), log_rows.flatten(1, 2))


def packed(
    mean: Float[Tensor, "lists averages head_dim"], log_rows: Float[Tensor, "lists averages"]
) -> UInt8[Tensor, "lists averages bytes"]:
    """Pack averages: numbers of 8 bits, then their unit and half the logarithm of the queries, in bfloat16.

    Args:
        mean: the averages.
        log_rows: half the logarithm of how many queries each has, relative to the mean number; -inf for none.

    Returns:
        ``head_dim + 4`` bytes for each average.
    """
    unit = (mean.abs().amax(2, keepdim=True) / _LARGEST).to(torch.bfloat16)
    short = (mean / unit.to(mean.dtype)).nan_to_num(nan=0.0).clamp(-_LARGEST, _LARGEST)
    parts = (x.to(kind) for x, kind in zip((short, unit, log_rows[..., None]), _KINDS, strict=True))
    return torch.cat([x.clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in parts], 2)


def unpacked(data: UInt8[Tensor, "lists averages bytes"], dtype: torch.dtype) -> Float[Tensor, "lists averages width"]:
    """Unpack averages.

    Args:
        data: from `packed`.
        dtype: dtype of the result.

    Returns:
        the averages, and behind each half the logarithm of its queries.
    """
    parts = zip(data.split([data.shape[2] - 4, 2, 2], 2), _KINDS, strict=True)
    # a copy begins at an address that numbers of 16 bits may have, whatever the width
    short, unit, log_rows = (x.clone(memory_format=torch.contiguous_format).view(kind).to(dtype) for x, kind in parts)
    return torch.cat([short * unit, log_rows], 2)


def _positions(grid: Grid, cell: Cell, device: torch.device) -> Tensor:
    """Number the positions of the blocks that a cell of queries touches."""
    begin = cell.start // grid.tile * grid.tile
    return begin + torch.arange(grid.tiles(cell) * grid.tile, dtype=torch.int64, device=device)


def _factors(
    shard: Shard, grid: Grid, keys: Sequence[Cell], queries: Cell, position: Tensor
) -> Float[Tensor, "lists blocks head_dim head_dim"]:
    """Factor the covariance of the keys at each block's positions, as far as there are any."""
    begin = queries.start // grid.tile * grid.tile
    cell = next((cell for cell in keys if cell.start <= begin < cell.stop), None)
    if cell is None:
        one = torch.eye(shard.k.shape[3], dtype=shard.dtype, device=shard.k.device)
        return one.expand(shard.lists, len(position) // grid.tile, -1, -1)
    row = (position - cell.start + cell.base).clamp(max=cell.base + cell.size - 1)
    there = (position < cell.stop).expand(shard.lists, -1)
    if shard.live is not None:
        there = there & shard.live.index_select(1, row).repeat_interleave(shard.k.shape[1], 0)
    there = there.double().view(shard.lists, -1, grid.tile, 1)
    x = shard.k.flatten(0, 1).index_select(1, row).double()
    x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).unflatten(1, (-1, grid.tile))
    off = (x - (x * there).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(min=1)) * there
    return factor_of(off.transpose(2, 3) @ off).to(shard.dtype)
