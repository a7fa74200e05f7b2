"""Universal sets: keys that can have a large weight in the row of some query; one for all queries, or one per prefix."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

# a threshold is lowered by this share, because bounds are rounded
_SLACK = 1e-6


def largest(score: Float[Tensor, "*lists keys"], num: int, total: Int[Tensor, "*lists 1"]) -> Int[Tensor, "*lists num"]:
    """Take the `num` keys with the largest scores.

    Args:
        score: bounds of sensitivities.
        num: number of keys taken.
        total: number of live keys, which come first.

    Returns:
        ascending indices of min(num, keys) keys; the number of keys marks an empty place.
    """
    keys = score.shape[-1]
    dead = torch.arange(keys, dtype=torch.int64, device=score.device) >= total
    best, index = score.masked_fill(dead, -torch.inf).topk(min(num, keys), dim=-1)
    return index.masked_fill(best == -torch.inf, keys).sort(-1)[0]


def at_least(
    score: Float[Tensor, "*lists keys"], epsilon: float, total: Int[Tensor, "*lists 1"]
) -> Int[Tensor, "*lists num"]:
    """Take all keys whose score is at least epsilon; how many these are depends on the keys, and is read by the host.

    Args:
        score: bounds of sensitivities.
        epsilon: the threshold, lowered by a millionth of itself for the rounding of the scores.
        total: number of live keys, which come first.

    Returns:
        ascending indices, as wide as the longest list; the number of keys marks an empty place.
    """
    keys = score.shape[-1]
    key = torch.arange(keys, dtype=torch.int64, device=score.device)
    taken = (score >= epsilon * (1 - _SLACK)) & (key < total)
    width = int(taken.sum(-1).amax()) if taken.numel() else 0
    return key.masked_fill(~taken, keys).sort(-1)[0][..., :width]


def running_sets(score: Float[Tensor, "lists keys"], num: int, tile: int) -> Int[Tensor, "lists tiles num"]:
    """Take the `num` keys with the largest scores among the first 0, `tile`, 2 `tile`, ... keys: a set that grows and drops.

    Args:
        score: scores that do not look ahead; -inf for dead keys.
        num: number of keys of each set.
        tile: keys between two sets.

    Returns:
        the set before every tile of keys, and after the last one; the number of keys marks an empty place.
    """
    lists, keys = score.shape
    best = score.new_full((lists, num), -torch.inf)
    index = torch.full((lists, num), keys, dtype=torch.int64, device=score.device)
    sets = [index]
    for begin in range(0, keys, tile):
        own = torch.arange(begin, min(begin + tile, keys), dtype=torch.int64, device=score.device).expand(lists, -1)
        best, place = torch.cat([best, score[:, begin : begin + tile]], 1).topk(num, dim=1)
        index = torch.cat([index, own], 1).gather(1, place).masked_fill(best == -torch.inf, keys)
        sets.append(index)
    return torch.stack(sets, 1)


def candidates(
    sets: Int[Tensor, "lists tiles num"], first: Int[Tensor, "lists 1"], tile: int, after: int, keys: int
) -> Int[Tensor, "lists width"]:
    """List every key that may be in the set of a row which sees `first` keys or a few more: the last set, and later keys.

    Args:
        sets: from `running_sets`.
        first: fewest keys that a row of the chunk sees.
        tile: keys between two sets.
        after: how many keys more than the first another row of the chunk may see.
        keys: number of keys, which marks an empty place.

    Returns:
        indices of keys, `num` of the last set before `first` and tile + after of the keys from there on.
    """
    at = first // tile  # [lists, 1]
    before = sets.gather(1, at[..., None].expand(-1, -1, sets.shape[2]))[:, 0]
    later = at * tile + torch.arange(tile + after, dtype=torch.int64, device=sets.device)
    return torch.cat([before, later.clamp(max=keys)], 1)


def in_set(
    score: Float[Tensor, "lists keys"],
    index: Int[Tensor, "lists width"],
    limit: Int[Tensor, "lists rows"],
    num: int,
) -> Tensor:
    """Return which candidates are in the set of each row: the `num` largest scores among the keys that the row sees.

    Args:
        score: scores of all keys.
        index: candidates, from `candidates`.
        limit: leading keys that each row sees.
        num: keys of a set.

    Returns:
        ``[lists, rows, width]``, boolean.
    """
    own = pad(score, (0, 1), value=-torch.inf).gather(1, index)
    seen = own[:, None].masked_fill(index[:, None] >= limit[..., None], -torch.inf)
    best, place = seen.topk(min(num, index.shape[1]), dim=-1)
    return torch.zeros_like(seen, dtype=torch.bool).scatter(-1, place, best > -torch.inf)
