"""The attention that cached keys get from given queries: the score of several policies."""

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.cache.slots import CacheSlots

# scores held at once: 64 MiB in float32
_SCORES_AT_A_TIME = 2**24


def attended(
    held: CacheSlots, queries: Float[Tensor, "batch heads queries head_dim"], scale: float, rule: ScoreRule = PLAIN
) -> Float[Tensor, "batch kv_heads slots"]:
    """Sum the attention that each slot gets over queries and over the query heads of a group.

    a_s = sum_i w_s exp(scale q_i . k_s) / sum_t w_t exp(scale q_i . k_t)

    The queries are the latest ones: the last query sees every slot, the query before it all but the last slot, and so on.

    Args:
        held: all slots.
        queries: the latest queries.
        scale: factor of the scores.
        rule: the model's softcap and learned sinks; the share of learned sinks goes to no slot.

    Returns:
        the sums; 0 for empty slots.
    """
    batch, kv_heads, slots = held.log_weight.shape
    num, total = queries.shape[2], torch.zeros_like(held.log_weight)
    grouped = queries.unflatten(1, (kv_heads, -1))
    keys, place = held.k.to(total.dtype).transpose(2, 3), torch.arange(slots, dtype=torch.int64, device=total.device)
    size = max(1, _SCORES_AT_A_TIME // max(1, batch * queries.shape[1] * slots))
    for start in range(0, num, size):
        rows = grouped[:, :, :, start : start + size].to(total.dtype) * scale
        limit = torch.arange(start, start + rows.shape[3], dtype=torch.int64, device=total.device) + (slots - num + 1)
        # no row sees a slot after those that the last row sees
        seen = slots - num + start + rows.shape[3]
        scores = rule.cap((rows.flatten(2, 3) @ keys[..., :seen]).unflatten(2, rows.shape[2:4]))
        scores = scores + held.log_weight[:, :, None, None, :seen]
        scores.masked_fill_(place[:seen] >= limit[:, None], -torch.inf)
        # a row of padding sees no key, and its softmax is NaN
        total[..., :seen] += torch.nan_to_num_(_shares(scores, rule), nan=0.0).flatten(2, 3).sum(2)
    return total


def _shares(scores: Tensor, rule: ScoreRule) -> Tensor:
    """Compute the softmax of scores ``[batch, kv_heads, group, rows, slots]``."""
    if rule.sinks is None:
        return torch.softmax(scores, -1)
    sinks = rule.sinks.detach().to(scores.dtype).view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:4], 1)
    return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
