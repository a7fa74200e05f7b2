"""The list kernel in PyTorch: the reference for every other list kernel.

For each tile of queries: gather the keys of its runs, score them, add log-weights, softmax, gather and average values.

    out_i = sum_s w_s exp(q_i . k_s * scale) v_s / sum_s w_s exp(q_i . k_s * scale),    lse_i = log of the denominator

Tiles are processed in chunks, so that gathered memory is bounded at every length. The backward pass recomputes
the probabilities chunk by chunk; it is the exact gradient with the lists and their weights held fixed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# gathered keys, values and scores of one chunk of tiles: small enough for the last-level cache
CHUNK_BYTES = 12 * 2**20
# indices and weights of one batch of chunks: large enough that expanding them needs few calls
EXPANDED_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Lists:
    """The tensors of a `Selection`, flattened for an operator's schema; `types.Selection` documents their meaning."""

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
class Chunk:
    """The lists of a few tiles, expanded."""

    tiles: slice
    key_index: Tensor  # [chunk, slots], rows of the flattened keys
    bias: Tensor  # [chunk, 1, slots]
    banned: list[tuple[slice, Tensor]]  # slots, [chunk, rows, slots of a run]

    def split(self, step: int) -> "Iterator[Chunk]":
        """Cut into chunks of `step` tiles."""
        # most tiles are far from the diagonal of a run such as the sinks, and need no test; checking this on another device
        # than a CPU would make the host wait
        on_cpu = self.key_index.device.type == "cpu"
        needed = [pairs.flatten(1).any(1).tolist() if on_cpu else [True] * len(pairs) for _, pairs in self.banned]
        for at in range(0, len(self.key_index), step):
            part = slice(at, min(at + step, len(self.key_index)))
            tiles = slice(self.tiles.start + part.start, self.tiles.start + part.stop)
            banned = [
                (slots, pairs[part]) for (slots, pairs), some in zip(self.banned, needed, strict=True) if any(some[part])
            ]
            yield Chunk(tiles, self.key_index[part], self.bias[part], banned)


@dataclass(frozen=True)
class Workspace:
    """Buffers reused by every chunk: page faults of new buffers would cost more time than the arithmetic."""

    keys: Tensor
    values: Tensor
    scores: Tensor

    @classmethod
    def make(cls, step: int, rows: int, slots: int, widths: tuple[int, int], like: Tensor) -> "Workspace":
        """Allocate buffers for `step` tiles; widths are those of keys and of values."""
        shapes = ((step, slots, widths[0]), (step, slots, widths[1]), (step, rows, slots))
        return cls(*(like.new_empty(shape) for shape in shapes))


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def chunks(lists: Lists, num_keys: int, step: int, dtype: torch.dtype) -> Iterator[Chunk]:
    """Expand the lists to key indices, log-weights and banned pairs, `step` tiles at a time."""
    num_lists, num_tiles, rows = lists.row_limit.shape
    base = (lists.key_row * num_keys)[:, None].expand(-1, num_tiles).reshape(-1)
    tested = sum(
        f.shape[-1] * s * rows
        for f, s, *t in zip(lists.first, lists.size, lists.causal, lists.labelled, strict=True)
        if any(t) or lists.gap_low is not None
    )
    batch = step * max(1, EXPANDED_BYTES // (step * (20 * max(1, lists.num_slots) + 2 * tested)))
    for start in range(0, num_lists * num_tiles, batch):
        part = slice(start, min(start + batch, num_lists * num_tiles))
        indices, biases, banned, at = [], [], [], 0
        for i in range(len(lists.size)):
            index, bias = _expand(lists, i, part, dtype)
            pairs = _banned_pairs(lists, i, part, index)
            if pairs is not None:
                banned.append((slice(at, at + index.shape[1]), pairs))
            at += index.shape[1]
            indices.append(index + base[part, None])
            biases.append(bias)
        yield from Chunk(part, torch.cat(indices, 1), torch.cat(biases, 1)[:, None], banned).split(step)


def _expand(lists: Lists, run: int, part: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return key indices and log-weights of every slot of a run, ``[chunk, slots]``; -inf if a key does not count."""
    size = lists.size[run]
    first, weight = _flat(lists.first[run])[part], _flat(lists.log_weight[run])[part].to(dtype)
    index = first
    if size > 1:
        index = (first[..., None] + torch.arange(size, dtype=torch.int64, device=first.device)).flatten(1)
        weight = weight[..., None].expand(*weight.shape, size).flatten(1)
    live = (index >= _flat(lists.low[run])[part, None]) & (index < _flat(lists.high[run])[part, None])
    if lists.hole[run].numel():
        begin, end = lists.hole[run].flatten(1, 2)[:, part, None]
        live &= (index < begin) | (index >= end)
    # a slot that does not count still has a key index: the first key, which every row with a visible key sees, so that
    # values that are not finite do not reach other rows
    return index.masked_fill(~live, 0), weight.masked_fill(~live, -torch.inf)


def _banned_pairs(lists: Lists, run: int, part: slice, index: Tensor) -> Tensor | None:
    """Return the pairs of a run that its rows may not use: later keys, and pairs that an earlier stage took."""
    tests = []
    key = index[:, None]  # [chunk, 1, slots]
    if lists.causal[run]:
        tests.append(key >= _flat(lists.row_limit)[part, :, None])
    if lists.gap_low is not None and lists.gap_high is not None:
        tests.append((key >= _flat(lists.gap_low)[part, :, None]) & (key < _flat(lists.gap_high)[part, :, None]))
    if lists.labelled[run] and lists.row_label is not None and lists.key_label is not None:
        list_of_tile = (
            torch.arange(part.start, part.stop, dtype=torch.int64, device=index.device) // lists.row_limit.shape[1]
        )
        label = lists.key_label.flatten()[list_of_tile[:, None] * lists.key_label.shape[1] + index]
        tests.append(label[:, None] == _flat(lists.row_label)[part, :, None])
    return torch.stack(tests).any(0) if len(tests) > 1 else tests[0] if tests else None


def as_rows(x: Tensor, table: Tensor | None) -> Tensor:
    """Flatten keys or values to rows, unless they are in pages."""
    return x.reshape(-1, x.shape[-1]) if table is None else x


def gather(source: Tensor, index: Tensor, buffer: Tensor, table: Tensor | None = None) -> Tensor:
    """Copy rows into the buffer, in its dtype: ``[chunk, slots, width]``."""
    target = buffer[: len(index)]
    if table is not None:
        _, heads, size, _ = source.shape
        row, key = index // (table.shape[1] * size), index % (table.shape[1] * size)
        # a sequence without keys may have no page: its empty slots read key 0 of an arbitrary page in its table
        page = table[row // heads, key // size].clamp(0, source.shape[0] - 1)
        target.copy_(source[page, row % heads, key % size])
    elif source.dtype == buffer.dtype:
        torch.index_select(source, 0, index.flatten(), out=target.flatten(0, 1))
    else:
        target.copy_(source.index_select(0, index.flatten()).view_as(target))
    return target


def masked_scores(q: Tensor, keys: Tensor, chunk: Chunk, buffer: Tensor) -> Tensor:
    """Score gathered keys with their log-weights, into the buffer; -inf if a pair does not count."""
    scores = torch.bmm(q, keys.transpose(1, 2), out=buffer[: len(q)])  # [chunk, rows, slots]
    scores.add_(chunk.bias)
    for slots, pairs in chunk.banned:
        scores[:, :, slots].masked_fill_(pairs, -torch.inf)
    return scores


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention of every tile over the keys on its list.

    Args:
        q: queries by tile, ``[lists, tiles, rows, head_dim]``.
        k: keys, ``[key_rows, keys, head_dim]``, or pages of them, ``[pages, kv_heads, page_size, head_dim]``.
        v: values, ``[key_rows, keys, value_dim]``, or pages.
        lists: the selection; with pages, row ``s * kv_heads + h`` of the keys is head h of sequence s.
        scale: factor of the scores.
        table: pages of each sequence in order, ``[sequences, pages]``, if keys lie in pages.

    Returns:
        out ``[lists, tiles, rows, value_dim]`` in the dtype of `q`, and lse ``[lists, tiles, rows]``, float32 or float64.
    """
    num_lists, num_tiles, rows, head_dim = q.shape
    value_dim, slots = v.shape[-1], lists.num_slots
    num_keys = k.shape[1] if table is None else table.shape[1] * k.shape[2]
    lse = q.new_full((num_lists * num_tiles, rows), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    out = q.new_empty(num_lists * num_tiles, rows, value_dim)
    if not (num_keys and q.numel() and slots):
        out.zero_()
    else:
        q_flat, k_rows, v_rows = _flat(q), as_rows(k, table), as_rows(v, table)
        step = tiles_at_once(slots, rows, head_dim + value_dim, len(out))
        work = Workspace.make(step, rows, slots, (head_dim, value_dim), lse)
        for chunk in chunks(lists, num_keys, step, lse.dtype):
            keys = gather(k_rows, chunk.key_index, work.keys, table)
            scores = masked_scores(q_flat[chunk.tiles].to(lse.dtype) * scale, keys, chunk, work.scores)
            top = scores.amax(-1)
            # in place: a second buffer would evict the first from the CPU cache
            weights = torch.softmax(scores, -1, out=scores)
            # the largest weight of a row gives its normaliser; softmax over no key is NaN
            torch.sub(top, weights.amax(-1).log_(), out=lse[chunk.tiles])
            mean = _mean(weights, gather(v_rows, chunk.key_index, work.values, table), out[chunk.tiles])
            empty = top == -torch.inf
            # checking first saves time on a CPU, where the check needs no synchronisation
            if q.device.type != "cpu" or empty.any():
                mean.masked_fill_(empty[..., None], 0.0)
                lse[chunk.tiles].masked_fill_(empty, -torch.inf)
    return out.view(num_lists, num_tiles, rows, value_dim), lse.view(num_lists, num_tiles, rows)


def _mean(weights: Tensor, values: Tensor, target: Tensor) -> Tensor:
    """Average values into the rows of `target`, which may be of a narrower dtype."""
    if target.dtype == weights.dtype:
        return torch.bmm(weights, values, out=target)
    return target.copy_(torch.bmm(weights, values))


def tiles_at_once(slots: int, rows: int, width: int, tiles: int) -> int:
    """Return the number of tiles of a chunk, so that gathered keys and values fit in the CPU cache."""
    # scores count twice, because several passes read them
    return min(tiles, max(1, CHUNK_BYTES // (4 * slots * (width + 2 * rows))))


def backward(
    grads: tuple[Tensor, Tensor], saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], lists: Lists, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradient of `forward` with respect to q, k and v, with fixed lists.

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
    dtype, num_keys, value_dim, slots = lse.dtype, k.shape[1], v.shape[-1], lists.num_slots
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format).flatten(0, 1)
    dk, dv = (x.new_zeros((x.shape[0] * num_keys, x.shape[-1]), dtype=dtype) for x in (k, v))
    if num_keys and q.numel() and slots:
        k_flat, v_flat = k.reshape(-1, head_dim), v.reshape(-1, value_dim)
        step = tiles_at_once(slots, rows, 2 * (head_dim + value_dim), len(dq))
        work = Workspace.make(step, rows, slots, (head_dim, value_dim), lse)
        grad_keys, slopes = (torch.empty_like(work.keys), torch.empty_like(work.values)), torch.empty_like(work.scores)
        for chunk in chunks(lists, num_keys, step, dtype):
            index, size = chunk.key_index.flatten(), len(chunk.key_index)
            keys, values = gather(k_flat, chunk.key_index, work.keys), gather(v_flat, chunk.key_index, work.values)
            queries = _flat(q)[chunk.tiles].to(dtype) * scale
            scores = masked_scores(queries, keys, chunk, work.scores)
            empty = _flat(lse)[chunk.tiles].unsqueeze(-1) == -torch.inf
            # a quarter of the time of exp
            prob = torch.softmax(scores, -1, out=scores)
            if q.device.type != "cpu" or empty.any():
                prob.masked_fill_(empty, 0.0)
            row_grad = _flat(grad_out)[chunk.tiles].to(dtype)
            dv_part = torch.bmm(prob.transpose(1, 2), row_grad, out=grad_keys[1][:size])
            dv.index_add_(0, index, dv_part.flatten(0, 1))
            centre = (row_grad * _flat(out)[chunk.tiles].to(dtype)).sum(-1, keepdim=True)
            centre = centre - _flat(grad_lse)[chunk.tiles].unsqueeze(-1)
            ds = torch.bmm(row_grad, values.transpose(1, 2), out=slopes[:size]).sub_(centre).mul_(prob)
            dq[chunk.tiles] = torch.bmm(ds, keys).mul_(scale).to(dq.dtype)
            dk_part = torch.bmm(ds.transpose(1, 2), queries, out=grad_keys[0][:size])
            dk.index_add_(0, index, dk_part.flatten(0, 1))
    return dq.view_as(q), dk.view_as(k).to(k.dtype), dv.view_as(v).to(v.dtype)
