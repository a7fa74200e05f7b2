"""Shares of keys, and draws from them, as a GPU makes them: one kernel scores, and one draws."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.kernels.choose.operator import alike_shares, draw_alike
from hyperattention.select.score.alike_scan import DEVIATIONS, HIDDEN, AlikeScan, Blocks
from hyperattention.select.score.precision import for_estimates
from hyperattention.select.score.stretches import CLIP_ROUNDS, LEAST

# numbers of four bytes that are held for each block and list of queries: a share of two bytes
FUSED_NUMBERS = 0.5


def fused_shares(scan: AlikeScan, part: slice, blocks: Blocks, num: int) -> tuple[Int[Tensor, "lists chunk"], Tensor]:
    """Estimate what `AlikeScan.shares` does, in one launch.

    Args:
        scan: averages of alike queries.
        part: which tiles.
        blocks: the keys.
        num: leading blocks that may be known.

    Returns:
        how many leading blocks each tile knows, and their shares, ``[lists, chunk * many, at least num]``, undefined beyond.
    """
    own, width = scan.own(part), blocks.keys.shape[2]
    known, seen = scan.bars(part, blocks)
    variance = None if blocks.size == 1 else for_estimates(blocks.squares[..., width:])
    spread = scan.spread[:, own] if blocks.size > 1 else scan.spread[:, own, :, :width]
    bar = seen.clamp(HIDDEN, -HIDDEN)
    query, spread = for_estimates(scan.query[:, own]), for_estimates(spread)
    return known, alike_shares(query, bar, spread, blocks.keys, variance, blocks.log_value, known, num, DEVIATIONS)


def fused_draws(
    known: Int[Tensor, "lists chunk"],
    share: Tensor,
    size: int,
    left: tuple[Tensor, ...],
    noise: Tensor,
    num: int,
    even: float,
) -> tuple[Int[Tensor, "lists rows num"], Float[Tensor, "lists rows num"]]:
    """Draw from the law of `stretches_of`, or list all keys where they are few, in one launch.

    Args:
        known: from `fused_shares`.
        share: from `fused_shares`.
        size: keys in a block.
        left: what earlier stages left, from `edges`, for each tile.
        noise: where inside a slot each list's points lie, ``[lists, chunk * many, 1]``.
        num: draws of each list.
        even: share of the draws that is spread evenly over the keys.

    Returns:
        keys and their log-weights.
    """
    return draw_alike(share, known, torch.cat(left, 2), noise[..., 0], num, size, even, CLIP_ROUNDS, LEAST)
