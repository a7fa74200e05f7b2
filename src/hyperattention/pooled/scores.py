"""Scores of a rank's keys by averages of queries: the sum of an average's scores, and the largest share of each key."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hyperattention.pooled.law import MOST
from hyperattention.pooled.layout import Cell, Grid
from hyperattention.pooled.pool import Near, Shard

# scores in one product: few enough to stay in the cache of a CPU
_SCORES = 2**21
# the same on another device, where large products are faster
_DEVICE_SCORES = 2**26


def log_sums(
    shard: Shard, cell: Cell, asked: Float[Tensor, "lists averages width"], eligible: Bool[Tensor, "lists keys"]
) -> Float[Tensor, "lists averages"]:
    """Sum up the exponentials of every average's scores over the eligible keys of a cell.

    Args:
        shard: the rank's keys.
        cell: the cell of keys.
        asked: averages of a chunk, each followed by the logarithm of its queries.
        eligible: which keys count.

    Returns:
        logarithms; -inf if no key counts.
    """
    total = asked.new_full(asked.shape[:2], -torch.inf, dtype=torch.float64)
    for one, keys, score in _scores(shard, cell, asked):
        score.masked_fill_(~eligible[one, keys], -torch.inf)
        total[one] = torch.logaddexp(total[one], score.logsumexp(1).double())
    return torch.nan_to_num(total, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).to(asked.dtype)


def best_shares(
    shard: Shard, cell: Cell, asked: Float[Tensor, "lists averages width"], totals: Float[Tensor, "lists averages"],
    eligible: Bool[Tensor, "lists keys"],
) -> Float[Tensor, "lists keys"]:  # fmt: skip
    """Estimate the largest share that any average gives each key, times the root of the number of its queries.

    Args:
        shard: the rank's keys.
        cell: the cell of keys.
        asked: as for `log_sums`.
        totals: logarithms of each average's sum over all keys, also those that its queries read directly.
        eligible: which keys count.

    Returns:
        the shares; 0 for keys that do not count.
    """
    best = asked.new_zeros(eligible.shape)
    bar = asked[..., -1] - totals
    # an average without queries, or whose sum is not finite, gives no shares
    bar = bar.masked_fill(~torch.isfinite(bar), -torch.inf)
    for one, keys, score in _scores(shard, cell, asked):
        best[one, keys] = score.add_(bar[one, :, None]).amax(0).exp_()
    best = torch.nan_to_num(best, nan=0.0, posinf=MOST).clamp_(max=MOST)
    return best.masked_fill_(~eligible, 0.0)


def near_sums(
    near: Near, begin: int, cell: Cell, grid: Grid, own: Float[Tensor, "lists averages width"]
) -> Float[Tensor, "lists averages"]:
    """Sum up the exponentials of every average's scores over the keys that its queries read directly.

    Args:
        near: the keys near this rank's queries.
        begin: the first of those near this cell.
        cell: the cell of queries.
        grid: the blocks.
        own: the averages of the cell, block by block, each followed by the logarithm of its queries.

    Returns:
        logarithms; an average counts what the last query of its block sees.
    """
    low, high = grid.local(cell)
    first, blocks = cell.start // grid.tile, own.unflatten(1, (grid.tiles(cell), -1))
    sums = own.new_empty(blocks.shape[:3])
    for one in range(len(own)):
        batch, head = divmod(one, near.k.shape[1])
        keys = near.k[batch, head, begin : begin + high - low].to(own.dtype)
        keys = torch.nan_to_num(keys, nan=0.0, posinf=0.0, neginf=0.0)
        for block in range(blocks.shape[1]):
            end = min(high, (first + block + 1) * grid.tile) if grid.causal else high
            seen = max(0, end - low)
            score = blocks[one, block, :, :-1] @ keys[:seen].T
            if near.live is not None:
                score.masked_fill_(~near.live[batch, begin : begin + seen], -torch.inf)
            sums[one, block] = score.logsumexp(1)
    return torch.nan_to_num(sums, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).flatten(1)


def _scores(shard: Shard, cell: Cell, asked: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Score a few keys of one list at a time: the list, the keys, and ``[averages, keys]``."""
    if not asked.shape[1]:
        return
    limit = _SCORES if asked.device.type == "cpu" else _DEVICE_SCORES
    step = max(1, limit // asked.shape[1])
    for one in range(shard.lists):
        keys = shard.k[one // shard.k.shape[1], one % shard.k.shape[1], cell.base : cell.base + cell.size]
        for at in range(0, cell.size, step):
            part = slice(at, min(at + step, cell.size))
            some = torch.nan_to_num(keys[part].to(asked.dtype), nan=0.0, posinf=0.0, neginf=0.0)
            yield one, part, asked[one, :, :-1] @ some.T
