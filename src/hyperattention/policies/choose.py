"""Choose slots by scores: the best candidates, or a sample of them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.cache.policy import CompressionRequest
from hyperattention.cache.slots import CacheSlots
from hyperattention.random import uniform


def best(score: Float[Tensor, "batch kv_heads slots"], full: CompressionRequest) -> Int[Tensor, "batch kv_heads num"]:
    """Find the candidates with the largest scores.

    Args:
        score: one score per candidate.
        full: the cache.

    Returns:
        their indices, in the order of their positions; empty slots only if no other is left.
    """
    score = score.masked_fill(~full.candidates.live, -torch.inf)
    return score.topk(full.num, -1).indices.sort(-1).values


def keep_best(score: Float[Tensor, "batch kv_heads slots"], full: CompressionRequest) -> CacheSlots:
    """Keep the candidates with the largest scores, with unchanged weights.

    Args:
        score: one score per candidate.
        full: the cache.

    Returns:
        the kept slots, in the order of their positions.
    """
    index = best(score, full)
    return full.candidates.take(index, full.candidates.log_weight.gather(2, index))


def lottery(full: CompressionRequest, salt: int = 0, *, anew: bool = False) -> Float[Tensor, "batch kv_heads slots"]:
    """Return a random number in (0, 1] for every candidate, determined by its position and head.

    Args:
        full: the cache.
        salt: makes several lotteries of one policy independent.
        anew: whether every compression draws new numbers.

    Returns:
        float64; rows of a batch share them.
    """
    position = full.candidates.position.long()
    seed, layer, turn = full.counters
    head = torch.arange(position.shape[1], dtype=torch.int64, device=position.device)[:, None]
    return 1.0 - uniform((seed, layer, salt, turn + 1 if anew else 0, head, position), position.device)
