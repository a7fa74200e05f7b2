"""Packed sequences of unequal lengths: their queries are cut into tiles, so that one launch computes all sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.kernels.list.operator import list_attention
from hyperattention.types import Runs, Selection

# positions in a tile, fewer if every sequence is shorter
TILE = 64


@dataclass(frozen=True)
class Packed:
    """The edges of sequences among packed queries, and the keys that they may see.

    Args:
        first: row of each sequence's first query.
        count: queries of each sequence.
        keys: number of keys of each sequence; its last query stands at the last key if `causal`.
        offset: position of each sequence's first query among its keys.
        causal: whether a query sees only keys at or before its own position.
    """

    first: Sequence[int]
    count: Sequence[int]
    keys: Sequence[int]
    offset: Sequence[int]
    causal: bool

    def tiles(self) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the queries of every sequence into tiles, on the CPU.

        Returns:
            the sequence of each tile ``[tiles]``; the row of each of its queries ``[tiles, tile]``, -1 for padding; how many
            keys of its sequence each query sees ``[tiles, tile]``, 0 for padding.
        """
        size = max(1, min(TILE, max(self.count, default=1)))
        sequence, row, limit = [], [], []
        place = torch.arange(size, dtype=torch.int64, device="cpu")
        for s, (first, count, keys, offset) in enumerate(zip(self.first, self.count, self.keys, self.offset, strict=True)):
            number = -(-count // size)
            at = torch.arange(number, dtype=torch.int64, device="cpu")[:, None] * size + place
            inside = at < count
            seen = (at + offset + 1).clamp(0, keys) if self.causal else torch.full_like(at, keys)
            sequence.append(torch.full((number,), s, dtype=torch.int64, device="cpu"))
            row.append((at + first).masked_fill(~inside, -1))
            limit.append(seen.masked_fill(~inside, 0))
        empty = torch.zeros(0, size, dtype=torch.int64, device="cpu")
        return torch.cat([empty[:, 0], *sequence]), torch.cat([empty, *row]), torch.cat([empty, *limit])


def ragged_attention(
    query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "*key_rows keys head_dim"],
    value: Float[Tensor, "*key_rows keys value_dim"],
    packed: Packed,
    scale: float,
    *,
    first_key: Sequence[int] | None = None,
    table: Int[Tensor, "sequences pages"] | None = None,
    kv_heads: int,
) -> tuple[Float[Tensor, "rows heads value_dim"], Float[Tensor, "rows heads"]]:
    """Compute exact attention within each sequence, in one launch of the list kernel.

    Every tile lists one run, the keys of its sequence, without an index for each key.

    Args:
        query: packed queries.
        key: keys of all sequences end to end, ``[kv_heads, keys, head_dim]``, or pages, with a table.
        value: values, in the layout of the keys.
        packed: edges of the sequences.
        scale: factor of the scores.
        first_key: where each sequence's keys begin, without pages.
        table: pages of each sequence in order, with pages.
        kv_heads: heads of the keys.

    Returns:
        out and lse of the queries of all sequences, in the order of the sequences.
    """
    sequence, row, limit = packed.tiles()
    inside = row >= 0
    group, (tiles, size), device = query.shape[1] // kv_heads, row.shape, query.device
    begin = (
        torch.zeros(len(sequence), dtype=torch.int64, device="cpu")
        if first_key is None
        else torch.tensor(first_key, dtype=torch.int64, device="cpu")[sequence]
    )
    head = torch.arange(kv_heads, dtype=torch.int64, device="cpu")
    key_row = head.expand(tiles, -1) if table is None else sequence[:, None] * kv_heads + head
    # the position of each query's result among the results of the tiles, known before anything runs
    place = torch.arange(tiles * size, dtype=torch.int64, device="cpu")[inside.flatten()].to(device)
    lists = [x.repeat_interleave(kv_heads, 0).to(device) for x in (begin, begin + limit.amax(1), begin[:, None] + limit)]
    first, high, row_limit = lists[0], lists[1], lists[2]
    runs = Runs(
        first=first[:, None, None],
        size=max(1, *packed.keys) if packed.keys else 1,
        log_weight=torch.zeros(len(first), 1, 1, dtype=torch.float32, device=device),
        low=first[:, None],
        high=high[:, None],
        causal=True,
    )
    q = query[row.clamp(min=0).to(device)].unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)
    q = q.reshape(tiles * kv_heads, 1, group, size, query.shape[2])
    selection = Selection((runs,), row_limit=row_limit[:, None].repeat(1, 1, group), key_row=key_row.flatten().to(device))
    out, lse = list_attention(q, key, value, selection, scale, table)

    def restored(x: Tensor) -> Tensor:
        x = x.reshape(tiles, kv_heads, group, size, *x.shape[4:]).movedim(3, 1)
        return x.flatten(2, 3).flatten(0, 1)[place]

    return restored(out), restored(lse)
