"""Exact polynomial attention over a few keys: the blocks near the diagonal."""

from itertools import pairwise

import torch
from torch import Tensor

from hyperattention.types import Partial

# pairs weighted at once: a chunk that stays in a cache
CHUNK_PAIRS = 2**19


def polynomial_attention(q: Tensor, k: Tensor, v: Tensor, degree: int) -> Partial:
    """Compute attention with weights (q . k)^degree, pair by pair.

    w_ij = (q_i . k_j)^degree  for the keys that row i sees,    lse_i = log sum_j w_ij

    Weights are relative to the largest of their row, so that no degree overflows.

    Args:
        q: ``[batch, heads, queries, head_dim]``; the last query sees every key, the one before all but one, and so on.
        k: ``[batch, heads, keys, head_dim]``.
        v: ``[batch, heads, keys, value_dim]``.
        degree: even and positive.

    Returns:
        the rows, in the dtype of `v`, and lse in float32 (float64 for float64); 0 and -inf for rows whose weights are all 0.
    """
    queries, keys = q.shape[2], k.shape[2]
    scores = q @ k.transpose(2, 3)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if queries > 1:
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
        scores = scores.masked_fill(hidden, 0.0)
    top = scores.detach().abs().amax(-1, keepdim=True)
    # rows of zeros take any finite number here: 0 / 0 would be NaN
    top = top.masked_fill(top == 0, 1.0)
    weight = even_power(scores / top, degree)
    total = weight.sum(-1)
    empty = total == 0
    out = (weight.to(v.dtype) @ v) / total.masked_fill(empty, 1.0)[..., None]
    lse = (degree * top[..., 0].log() + total.masked_fill(empty, 1.0).log()).masked_fill(empty, -torch.inf)
    return Partial(out.to(v.dtype), lse)


def polynomial_blocks(q: Tensor, k: Tensor, v: Tensor, degree: int, block: int) -> Partial:
    """Compute causal polynomial attention within blocks of consecutive tokens: the earlier blocks are not seen.

    Args:
        q: ``[batch, heads, tokens, head_dim]``.
        k: ``[batch, heads, tokens, head_dim]``.
        v: ``[batch, heads, tokens, value_dim]``.
        degree: even and positive.
        block: tokens in a block; the last block may be shorter.

    Returns:
        as `polynomial_attention`. No more than `CHUNK_PAIRS` pairs, or one block of every head, are weighted at once.
    """
    tokens = q.shape[2]
    at_once = block * max(1, CHUNK_PAIRS // max(1, q.shape[0] * q.shape[1] * block**2))
    whole = tokens // block * block
    edges = [*range(0, whole, at_once), whole, tokens]
    parts = [_blocks(q, k, v, degree, slice(a, b), block) for a, b in pairwise(edges) if a < b]
    if not parts:
        return Partial(v.new_zeros(v.shape), v.new_zeros(v.shape[:3], dtype=torch.promote_types(v.dtype, torch.float32)))
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))


def _blocks(q: Tensor, k: Tensor, v: Tensor, degree: int, part: slice, block: int) -> Partial:
    size = min(block, part.stop - part.start)
    # the blocks of a head become heads
    q_rows, k_rows, v_rows = (x[:, :, part].unflatten(2, (-1, size)).flatten(1, 2) for x in (q, k, v))
    near = polynomial_attention(q_rows, k_rows, v_rows, degree)
    shape = (q.shape[1], (part.stop - part.start) // size)
    return Partial(*(x.unflatten(1, shape).flatten(2, 3) for x in (near.out, near.lse)))


def even_power(x: Tensor, degree: int) -> Tensor:
    """Raise to an even power by squaring: `pow` is several times slower on a CPU.

    Args:
        x: any tensor.
        degree: even and positive.

    Returns:
        x to that power.
    """
    square, left, power = x * x, degree // 2, None
    while left:
        if left % 2:
            power = square if power is None else power * square
        left //= 2
        if left:
            square = square * square
    assert power is not None
    return power
