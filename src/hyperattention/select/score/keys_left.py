"""Single keys: which of them earlier stages left, and runs that list chosen keys."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.select.score.pooling import edges, seen_keys
from hyperattention.select.stage import CoveredKeys
from hyperattention.tiling import Tiles
from hyperattention.types import Runs


def keys_left(tiles: Tiles, covered: CoveredKeys, left: tuple[Tensor, ...], part: slice) -> Bool[Tensor, "lists chunk seen"]:
    """Return which of the keys that a chunk of tiles can see were left by earlier stages.

    Args:
        tiles: the tiled problem.
        covered: keys of earlier stages; pairs taken by a hash are left to the kernel, which skips them.
        left: edges of the remaining keys by position, from `edges`, for all tiles.
        part: the chunk.

    Returns:
        one boolean per key, for the first `seen_keys` keys.
    """
    seen = seen_keys(tiles, part)
    begin, hole_begin, hole_end, end = (x[:, part] for x in left)
    key = torch.arange(seen, dtype=torch.int64, device=begin.device)
    free = ((key >= begin) & (key < hole_begin)) | ((key >= hole_end) & (key < end))
    for blocks, size in covered.blocks:
        number = -(-seen // size)
        # one extra block takes the marks of empty slots, and of blocks that the chunk does not see
        chosen = torch.zeros((*free.shape[:2], number + 1), dtype=torch.bool, device=free.device)
        chosen.scatter_(2, blocks[:, part].clamp(max=number), True)
        free &= ~chosen[..., :number].repeat_interleave(size, 2)[..., :seen]
    return free


def key_runs(
    tiles: Tiles,
    covered: CoveredKeys,
    index: Int[Tensor, "lists tiles slots"],
    log_weight: Float[Tensor, "lists tiles slots"],
) -> Runs:
    """List single keys; those that earlier stages took become empty slots.

    Args:
        tiles: the tiled problem.
        covered: keys of earlier stages.
        index: keys; they may be taken already, or lie beyond all keys.
        log_weight: their log-weights, -inf for an empty slot.

    Returns:
        runs of one key each.
    """
    begin, hole_begin, hole_end, end = edges(tiles, covered)
    gone = (index >= hole_begin) & (index < hole_end)
    if covered.blocks:
        gone |= covered.holds(index)
    return Runs(
        first=index,
        size=1,
        log_weight=log_weight.float().masked_fill(gone, -torch.inf),
        low=begin[..., 0],
        high=end[..., 0],
        causal=tiles.problem.causal and covered.gap is None,
        labelled=covered.labels is not None,
    )
