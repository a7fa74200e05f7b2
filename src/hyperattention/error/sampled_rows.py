"""Exact attention for the sampled rows: computed once, it serves to measure any number of outputs."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.error.row_statistics import column_spread, residual_ratio, softmax_norm, value_norm
from hyperattention.exact import grouped_scores

# bytes of softmax rows held at once; several heads run together only if they fit
_CHUNK_BYTES = 64 * 2**20
# the same on any other device, where a few large operations are faster
_DEVICE_CHUNK_BYTES = 1024 * 2**20
# causal rows are scored in blocks, each against the keys its last row sees: fewer rows would starve the matrix product
_BLOCK_ROWS = 32


@dataclass(frozen=True)
class SampledRows:
    """The sampled rows, and the parts of the problem that their errors need.

    Args:
        index: the rows, in order.
        visible: number of leading keys that each row may see.
        windows: heavy keys [begin, end) around each row.
        sinks: number of leading live keys that are heavy.
        num_queries: number of queries from which rows are drawn.
        scale: factor on the scores.
    """

    index: Int[Tensor, " rows"]
    visible: list[int]
    windows: list[tuple[int, int]]
    sinks: int
    num_queries: int
    scale: float


@dataclass(frozen=True)
class ExactSample:
    """Exact attention on the sampled rows: computed once, it serves to measure any number of outputs.

    Args:
        exact: the rows.
        live: whether each row sees at least one key.
        size: divisor of the norm of an output's error on these rows: the norms of softmax matrix and values, and the share
            of rows that were sampled.
        alpha: estimate of alpha.
        kappa: lower bound of kappa.
    """

    exact: Float[Tensor, "batch heads rows value_dim"]
    live: Bool[Tensor, "batch rows"]
    size: Float[Tensor, "batch heads"]
    alpha: Float[Tensor, "batch heads"]
    kappa: Float[Tensor, "batch heads"]


def measure_rows(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    key_mask: Bool[Tensor, "batch keys"] | None,
    sample: SampledRows,
) -> ExactSample:
    """Compute exact attention for the sampled rows, as many heads at a time as fit in memory.

    Args:
        query: queries.
        key: keys.
        value: values.
        key_mask: True = attend.
        sample: the rows.

    Returns:
        the rows, and the figures that come from their softmax weights.
    """
    batch, heads, kv_heads, num_keys = *query.shape[:2], *key.shape[1:3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape, rows = (kv_heads, heads // kv_heads), len(sample.index)
    q = query.index_select(2, sample.index).to(dtype).unflatten(1, shape)
    per_head = max(1, rows * num_keys * dtype.itemsize)
    most = _CHUNK_BYTES if query.device.type == "cpu" else _DEVICE_CHUNK_BYTES
    group_size = max(1, min(shape[1], most // per_head))
    head_size = max(1, most // (per_head * shape[1]))
    exact = q.new_empty((batch, *shape, rows, value.shape[3]))
    figures = q.new_empty((3, batch, *shape))
    live = torch.empty((batch, rows), dtype=torch.bool, device=q.device)
    for entry in range(batch):
        for start in range(0, kv_heads, head_size):
            at = (slice(entry, entry + 1), slice(start, start + head_size))
            mask = None if key_mask is None else key_mask[entry : entry + 1]
            k, v = key[at].to(dtype), value[at].to(dtype)
            # a masked value may be NaN, and 0 * NaN is NaN
            v = v if mask is None else v.masked_fill(~mask[:, None, :, None], 0.0)
            sized = value_norm(v)[..., None]
            for first in range(0, shape[1], group_size):
                part = (*at, slice(first, first + group_size))
                exact[part], live[entry], figures[(slice(None), *part)] = _measure_heads(q[part], k, v, mask, sample)
            figures[(0, *at)] *= sized
    size, alpha, kappa = figures.flatten(2, 3)
    return ExactSample(exact.flatten(1, 2), live, size, alpha, kappa)


def _measure_heads(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, sample: SampledRows
) -> tuple[Tensor, Tensor, Tensor]:
    blocks, exact, lse = _softmax_blocks(q, k, v, key_mask, sample)
    live, num_keys = lse[0, 0, 0] != -torch.inf, k.shape[2]
    # the norm of the sampled rows is scaled up to that of all rows
    stretch = (sample.num_queries / len(sample.index)) ** 0.5
    size = softmax_norm(blocks, num_keys, sample.num_queries, int(live.sum())) / stretch
    first = sample.sinks
    if key_mask is not None:
        # sinks are the first live keys; masked keys between them have weight 0
        first = int((key_mask.long().cumsum(-1) <= sample.sinks).sum())
    kappa = residual_ratio(blocks, lse, first, sample.windows)
    return exact, live, torch.stack([size, column_spread(blocks, num_keys), kappa])


def hide_later(scores: Tensor, counts: list[int], *, at_once: bool | None = None) -> None:
    """Overwrite the scores of keys that a row may not see.

    Args:
        scores: ``[..., rows, keys]``.
        counts: number of leading keys that each row may see.
        at_once: whether to use one operation with a mask of rows x keys; None: one operation on all devices except a CPU,
            where a fill for each row costs less.
    """
    if scores.device.type != "cpu" if at_once is None else at_once:
        limit = torch.tensor(counts, dtype=torch.int64, device=scores.device)[:, None]
        scores.masked_fill_(torch.arange(scores.shape[-1], dtype=torch.int64, device=scores.device) >= limit, -torch.inf)
        return
    for row, count in enumerate(counts):
        scores[..., row, count:] = -torch.inf


def _softmax_blocks(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, sample: SampledRows
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Compute the softmax rows in blocks [1, kv_heads, group, few rows, keys seen], the exact rows and their lse."""
    rows = q.shape[3]
    size = rows if min(sample.visible) == k.shape[2] else _BLOCK_ROWS
    blocks, exact, lses = [], [], []
    for start in range(0, rows, size):
        few, counts = q[:, :, :, start : start + size], sample.visible[start : start + size]
        stop = max(1, *counts)  # a softmax needs a column, hidden or not
        scores = grouped_scores(few, k[:, :, :stop], sample.scale)
        hide_later(scores, counts)
        if key_mask is not None:
            scores.masked_fill_(~key_mask[:, None, None, None, :stop], -torch.inf)
        top = scores.amax(-1)
        # softmax takes a quarter of the time of exp; the largest weight of a row then gives its normaliser
        weights = torch.softmax(scores, -1, out=scores)
        empty = top == -torch.inf
        if empty.any():
            weights.masked_fill_(empty[..., None], 0.0)
        lse = torch.where(empty, top, top - weights.amax(-1).log())
        blocks.append(weights)
        exact.append((weights.flatten(2, 3) @ v[:, :, :stop]).unflatten(2, few.shape[2:4]))
        lses.append(lse)
    return blocks, torch.cat(exact, dim=3), torch.cat(lses, dim=3)
