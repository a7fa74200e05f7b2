"""The list kernel in PyTorch: the specification that every other list kernel is compared with.

For each tile of queries: gather the keys its runs name, score them, add log-weights, softmax, gather and average values.

    out_i = sum_s w_s exp(q_i . k_s * scale) v_s / sum_s w_s exp(q_i . k_s * scale),    lse_i = log of the denominator

Tiles are taken in chunks, so that what is gathered at any time is bounded whatever the length. The backward pass recomputes
the probabilities chunk by chunk; it is the exact gradient with the lists and their weights held fixed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# gathered keys, values and scores of one chunk of tiles: small enough to stay in the last level of cache
CHUNK_BYTES = 12 * 2**20


@dataclass(frozen=True)
class Lists:
    """The tensors of a `Selection`, flattened as an operator's schema needs them; see `types.Selection` for their meaning."""

    key_row: Tensor
    row_limit: Tensor
    first: list[Tensor]
    size: list[int]
    log_weight: list[Tensor]
    low: list[Tensor]
    high: list[Tensor]
    hole: list[Tensor]
    causal: list[bool]
    labelled: list[bool]
    row_label: Tensor | None
    key_label: Tensor | None
    gap_low: Tensor | None
    gap_high: Tensor | None

    @property
    def num_slots(self) -> int:
        """Keys listed for each tile, masked ones included."""
        return sum(f.shape[-1] * s for f, s in zip(self.first, self.size, strict=True))


@dataclass(frozen=True)
class _Chunk:
    tiles: slice
    key_index: Tensor  # [chunk, slots], rows of the flattened keys
    bias: Tensor  # [chunk, 1, slots]
    banned: list[tuple[slice, Tensor]]  # slots, [chunk, rows, slots of a run]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _chunks(lists: Lists, num_keys: int, rows: int, width: int, dtype: torch.dtype) -> Iterator[_Chunk]:
    """Expand the lists to key indices, log-weights and banned pairs, a chunk of tiles at a time."""
    num_lists, num_tiles = lists.row_limit.shape[:2]
    device = lists.row_limit.device
    per_tile = max(1, lists.num_slots) * (2 * width + 2 * rows) * 4
    step = max(1, CHUNK_BYTES // per_tile)
    limit = _flat(lists.row_limit)
    base = (lists.key_row * num_keys)[:, None].expand(-1, num_tiles).reshape(-1)
    for start in range(0, num_lists * num_tiles, step):
        part = slice(start, min(start + step, num_lists * num_tiles))
        indices, biases, banned, at = [], [], [], 0
        for i, size in enumerate(lists.size):
            first = _flat(lists.first[i])[part]
            index = (first[..., None] + torch.arange(size, device=device)).flatten(1)  # [chunk, slots]
            live = (index >= _flat(lists.low[i])[part, None]) & (index < _flat(lists.high[i])[part, None])
            if lists.hole[i].numel():
                begin, end = lists.hole[i].flatten(1, 2)[:, part, None]
                live &= (index < begin) | (index >= end)
            weight = _flat(lists.log_weight[i])[part].to(dtype)
            weight = weight.repeat_interleave(size, dim=1) if size > 1 else weight
            biases.append(weight.masked_fill(~live, -torch.inf))
            index = index.clamp(0, num_keys - 1)
            pairs = _banned_pairs(lists, i, part, index, limit)
            if pairs is not None:
                banned.append((slice(at, at + index.shape[1]), pairs))
            at += index.shape[1]
            indices.append(index + base[part, None])
        yield _Chunk(part, torch.cat(indices, 1), torch.cat(biases, 1)[:, None], banned)


def _banned_pairs(lists: Lists, run: int, part: slice, index: Tensor, limit: Tensor) -> Tensor | None:
    """Pairs of a run that its rows may not use: later keys, and pairs that an earlier stage took."""
    banned = None
    key = index[:, None]  # [chunk, 1, slots]
    if lists.causal[run]:
        banned = key >= limit[part, :, None]
    if lists.gap_low is not None and lists.gap_high is not None:
        inside = (key >= _flat(lists.gap_low)[part, :, None]) & (key < _flat(lists.gap_high)[part, :, None])
        banned = inside if banned is None else banned | inside
    if lists.labelled[run] and lists.row_label is not None and lists.key_label is not None:
        num_tiles = lists.row_limit.shape[1]
        list_of_tile = torch.arange(part.start, part.stop, device=index.device) // num_tiles
        label = lists.key_label[list_of_tile].gather(1, index)
        same = label[:, None] == _flat(lists.row_label)[part, :, None]
        banned = same if banned is None else banned | same
    return banned


def _scores(q: Tensor, gathered: Tensor, chunk: _Chunk) -> Tensor:
    scores = torch.bmm(q, gathered.transpose(1, 2))  # [chunk, rows, slots]
    scores.add_(chunk.bias)
    for slots, pairs in chunk.banned:
        scores[:, :, slots].masked_fill_(pairs, -torch.inf)
    return scores


def forward(q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from every tile to the keys on its list.

    Args:
        q: queries by tile, ``[lists, tiles, rows, head_dim]``.
        k: keys, ``[key_rows, keys, head_dim]``.
        v: values, ``[key_rows, keys, value_dim]``.
        lists: the selection.
        scale: factor of the scores.

    Returns:
        out ``[lists, tiles, rows, value_dim]`` in the dtype of `q`, and lse ``[lists, tiles, rows]``, float32 or float64.
    """
    num_lists, num_tiles, rows, head_dim = q.shape
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_keys, value_dim = k.shape[1], v.shape[-1]
    out = q.new_zeros(num_lists * num_tiles, rows, value_dim)
    lse = q.new_full((num_lists * num_tiles, rows), -torch.inf, dtype=acc)
    if not num_keys or not q.numel() or not lists.num_slots:
        return out.view(num_lists, num_tiles, rows, value_dim), lse.view(num_lists, num_tiles, rows)
    k_flat, v_flat, q_flat = k.reshape(-1, head_dim), v.reshape(-1, value_dim), _flat(q)
    for chunk in _chunks(lists, num_keys, rows, max(head_dim, value_dim), acc):
        index = chunk.key_index.flatten()
        keys = k_flat.index_select(0, index).to(acc).view(-1, chunk.key_index.shape[1], head_dim)
        scores = _scores(q_flat[chunk.tiles].to(acc) * scale, keys, chunk)
        top = scores.amax(-1, keepdim=True)
        empty = top == -torch.inf
        scores.sub_(top.masked_fill(empty, 0.0)).exp_()
        total = scores.sum(-1, keepdim=True)
        values = v_flat.index_select(0, index).to(acc).view(-1, chunk.key_index.shape[1], value_dim)
        weighted = torch.bmm(scores, values).div_(total.masked_fill(empty, 1.0))
        out[chunk.tiles] = weighted.to(out.dtype)
        lse[chunk.tiles] = (top + total.log())[..., 0]
    return out.view(num_lists, num_tiles, rows, value_dim), lse.view(num_lists, num_tiles, rows)


def backward(
    grads: tuple[Tensor, Tensor], saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], lists: Lists, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `forward` with respect to q, k and v, the lists held fixed.

    Args:
        grads: gradients of out and of lse.
        saved: q, k, v, out and lse of the forward pass.
        lists: the selection.
        scale: factor of the scores.

    Returns:
        gradients of q, k and v, in their dtypes.
    """
    (grad_out, grad_lse), (q, k, v, out, lse) = grads, saved
    _, _, rows, head_dim = q.shape
    acc, num_keys, value_dim = lse.dtype, k.shape[1], v.shape[-1]
    dq = torch.zeros_like(q).flatten(0, 1)
    dk, dv = (x.new_zeros((x.shape[0] * num_keys, x.shape[-1]), dtype=acc) for x in (k, v))
    k_flat, v_flat = k.reshape(-1, head_dim), v.reshape(-1, value_dim)
    usable = num_keys and q.numel() and lists.num_slots
    for chunk in _chunks(lists, num_keys, rows, 2 * max(head_dim, value_dim), acc) if usable else ():
        index, slots = chunk.key_index.flatten(), chunk.key_index.shape[1]
        keys = k_flat.index_select(0, index).to(acc).view(-1, slots, head_dim)
        values = v_flat.index_select(0, index).to(acc).view(-1, slots, value_dim)
        queries = _flat(q)[chunk.tiles].to(acc) * scale
        row_lse = _flat(lse)[chunk.tiles].unsqueeze(-1)
        prob = _scores(queries, keys, chunk).sub_(row_lse.masked_fill(row_lse == -torch.inf, 0.0)).exp_()
        row_grad = _flat(grad_out)[chunk.tiles].to(acc)
        dv.index_add_(0, index, torch.bmm(prob.transpose(1, 2), row_grad).flatten(0, 1))
        centre = (row_grad * _flat(out)[chunk.tiles].to(acc)).sum(-1, keepdim=True)
        centre = centre - _flat(grad_lse)[chunk.tiles].unsqueeze(-1)
        ds = torch.bmm(row_grad, values.transpose(1, 2)).sub_(centre).mul_(prob)
        dq[chunk.tiles] = torch.bmm(ds, keys).mul_(scale).to(dq.dtype)
        dk.index_add_(0, index, torch.bmm(ds.transpose(1, 2), queries).flatten(0, 1))
    return dq.view_as(q), dk.view_as(k).to(k.dtype), dv.view_as(v).to(v.dtype)
