"""Attention over every slot of a coreset, in place: the result of the list kernel for a list of all keys in order.

    out_i = sum_s w_s exp(q_i . k_s * scale) v_s / sum_s w_s exp(q_i . k_s * scale),    lse_i = log of the denominator

No key is gathered and no list is built: for one query, each would take longer than the arithmetic.
"""

import torch
from jaxtyping import Float
from torch import Tensor

# scores of one block of queries: small enough for the last-level cache
_SCORE_BYTES = 12 * 2**20
# up to so many slots one call that adds the log-weights is the fastest on a CPU, and an operator less
_FEW_SLOTS = 4096


def forward(
    q: Float[Tensor, "lists group queries head_dim"],
    k: Float[Tensor, "lists slots head_dim"],
    v: Float[Tensor, "lists slots value_dim"],
    log_weight: Float[Tensor, "lists slots"] | None,
    scale: float,
    *,
    causal: bool = False,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "lists group queries value_dim"], Float[Tensor, "lists group queries"]]:
    """Compute attention of all queries over all slots.

    Args:
        q: queries; those of a group share keys.
        k: keys.
        v: values.
        log_weight: log-weight of each slot; -inf for an empty slot. None if every slot has weight 1.
        scale: factor of the scores.
        causal: whether the last slots are the queries' own keys, of which each query sees those up to its own.
        softcap: bound of the scores, before log-weights are added: softcap * tanh(score / softcap); None for no bound.

    Returns:
        out in the dtype of `q`, and lse, float32 or float64.
    """
    lists, group, queries, _ = q.shape
    slots, dtype = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    keys, values, bias = k.to(dtype), v.to(dtype), None if log_weight is None else log_weight.to(dtype)[:, None]
    step = max(1, _SCORE_BYTES // (4 * lists * group * max(1, slots)))
    parts = []
    for start in range(0, queries, step):
        part = q[:, :, start : start + step].to(dtype)
        scores = _scores(part.flatten(1, 2), keys, bias, scale, softcap)  # [lists, rows, slots]
        if causal and queries > 1:
            limit = torch.arange(start, start + part.shape[2], dtype=torch.int64, device=q.device) + (slots - queries)
            later = torch.arange(slots, dtype=torch.int64, device=q.device) > limit[:, None]
            scores.unflatten(1, part.shape[1:3]).masked_fill_(later, -torch.inf)
        out, lse = _average(scores, values, every=bias is None and not causal)
        parts.append((out.to(q.dtype).unflatten(1, part.shape[1:3]), lse.unflatten(1, part.shape[1:3])))
    if not parts:
        return q.new_empty(lists, group, 0, v.shape[2]), q.new_empty(lists, group, 0, dtype=dtype)
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _scores(rows: Tensor, keys: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Compute scores with log-weights, contiguous."""
    if keys.shape[1] <= _FEW_SLOTS and softcap is None and bias is not None:
        return torch.baddbmm(bias, rows, keys.transpose(1, 2), alpha=scale)
    if keys.shape[1] <= _FEW_SLOTS:
        scores = torch.bmm(rows.mul(scale), keys.transpose(1, 2))
    else:
        # keys times queries: for many keys this order is up to two times as fast on a CPU as the other
        scores = torch.bmm(keys, rows.transpose(1, 2).mul(scale)).transpose(1, 2)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if bias is None:
        return scores.contiguous()
    return torch.add(scores, bias, out=torch.empty_like(scores, memory_format=torch.contiguous_format))


def _average(scores: Tensor, values: Tensor, *, every: bool) -> tuple[Tensor, Tensor]:
    if not scores.shape[2]:
        return values.new_zeros(*scores.shape[:2], values.shape[2]), scores.new_full(scores.shape[:2], -torch.inf)
    top = scores.amax(-1)
    weights = torch.softmax(scores, -1, out=scores)
    # the largest weight of a row gives its normaliser
    lse, out = top - weights.amax(-1).log_(), torch.bmm(weights, values)
    if every:
        return out, lse
    # softmax over no key is NaN
    empty = top == -torch.inf
    return out.masked_fill_(empty[..., None], 0.0), lse.masked_fill_(empty, -torch.inf)
