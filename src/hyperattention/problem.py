"""One attention problem, checked and in a normal form: the input of every method."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Queries, keys and values, which query may see which key, and the integers that determine every draw.

    Masked keys are already removed: live keys come first, in order, and are counted by their *rank*. Without a mask, rank
    and position are the same.

    Args:
        q: queries.
        k: keys, live keys first.
        v: values, in the order of the keys.
        scale: factor of the scores.
        causal: whether a query sees only keys at or before its own position.
        offset: position of the first query among the keys: 0 for upper-left alignment.
        rank: number of live keys at or before each position, or None if every key is live.
        seed: seed of every draw.
        layer: layer of the model, a counter of every draw.
        stored: the pages that hold the keys and values of this one sequence, or None if `k` and `v` hold them.
        heads: indices of the kv heads in the model's layer, counters of every draw; None for all, in order.
        spans: if the queries are only some of a sequence, in spans of equal length: the length of a span, and the distance
            between the first queries of two spans. None if the queries are consecutive.
        key_mask: True for live keys, if masked keys are still in place; only for methods that `follows_masks`, and without
            `rank`.
    """

    q: Float[Tensor, "batch heads queries head_dim"]
    k: Float[Tensor, "batch kv_heads keys head_dim"]
    v: Float[Tensor, "batch kv_heads keys value_dim"]
    scale: float
    causal: bool = False
    offset: int = 0
    rank: Int[Tensor, "batch keys"] | None = None
    seed: int = 0
    layer: int = 0
    stored: "Pages | None" = None
    heads: tuple[int, ...] | None = None
    spans: tuple[int, int] | None = None
    key_mask: Bool[Tensor, "batch keys"] | None = None

    @property
    def num_queries(self) -> int:
        """Queries of each head."""
        return self.q.shape[2]

    @property
    def num_keys(self) -> int:
        """Keys of each head, including masked keys."""
        return self.k.shape[2]

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.q.shape[1] // max(1, self.k.shape[1])

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.q.device

    @property
    def head_index(self) -> Int[Tensor, " kv_heads"]:
        """Return the index of every kv head: the counter of its draws."""
        numbers = range(self.k.shape[1]) if self.heads is None else self.heads
        parts = [
            torch.arange(each.start, each.stop, dtype=torch.int64, device=self.device)
            for each in _ranges(numbers) or [range(0)]
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def position(self) -> Int[Tensor, " queries"]:
        """Return the position of every query among the keys."""
        row = torch.arange(self.num_queries, dtype=torch.int64, device=self.device)
        if self.spans is not None:
            length, step = self.spans
            row = row // length * step + row % length
        return row + self.offset

    def of_heads(self, kv_heads: Sequence[int]) -> "Problem":
        """Keep some kv heads, with the query heads that share them; their draws stay the same.

        Args:
            kv_heads: indices of the kv heads to keep, within this problem.

        Returns:
            the smaller problem; keys and values are views if the heads are adjacent.

        Raises:
            NotImplementedError: if the keys are in pages, which hold all heads together.
        """
        if self.stored is not None:
            raise NotImplementedError("keys in pages cannot be split by head: use one method for all heads")
        numbers = tuple(range(self.k.shape[1]) if self.heads is None else self.heads)
        ranges = _ranges(kv_heads)

        def kept(x: Tensor, group: int) -> Tensor:
            parts = [x[:, each.start * group : each.stop * group] for each in ranges]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

        q, k, v = kept(self.q, self.group), kept(self.k, 1), kept(self.v, 1)
        return replace(self, q=q, k=k, v=v, heads=tuple(numbers[head] for head in kv_heads))

    def of_spans(self, first: int, length: int, step: int) -> "Problem":
        """Keep some queries: complete spans of `length`, `step` positions apart. Tiles in them list the same keys as before.

        Args:
            first: first query kept.
            length: queries in a span.
            step: distance between the first queries of two spans.

        Returns:
            the smaller problem, with a copy of those queries.

        Raises:
            ValueError: if no complete span fits, or the problem already has spans.
        """
        count = (self.num_queries - first - length) // step + 1
        if self.spans is not None or count < 1 or first < 0 or length > step:
            raise ValueError(
                f"no complete span of {length} queries, {step} apart from query {first} on, fits in {self.num_queries} "
                "consecutive queries: use shorter spans that do not overlap"
            )
        q = self.q[:, :, first : first + (count - 1) * step + length]
        # the last span may be shorter than a step
        q = torch.nn.functional.pad(q, (0, 0, 0, step - length)).unflatten(2, (count, step))[:, :, :, :length].flatten(2, 3)
        return replace(self, q=q, offset=self.offset + first, spans=(length, step))

    def storage(self) -> "tuple[Tensor, Tensor, Tensor | None]":
        """Return the tensors from which kernels read keys and values: rows, or pages with their table."""
        if self.stored is not None:
            return self.stored.key, self.stored.value, self.stored.table
        return self.k.flatten(0, 1), self.v.flatten(0, 1), None

    def live_before(self, position: Int[Tensor, "*any"]) -> Int[Tensor, "batch *any"]:
        """Count live keys strictly before each position; positions may lie outside the keys."""
        position = position.clamp(0, self.num_keys)
        if self.rank is None:
            return position[None]
        padded = torch.nn.functional.pad(self.rank, (1, 0))
        return padded[:, position]


@dataclass(frozen=True)
class Pages:
    """Keys and values in pages, and the table of each sequence's pages.

    Args:
        key: pages of keys.
        value: pages of values.
        table: pages of each sequence, in order.
    """

    key: Float[Tensor, "pages kv_heads page_size head_dim"]
    value: Float[Tensor, "pages kv_heads page_size value_dim"]
    table: Int[Tensor, "sequences pages_each"]

    def rows(self, x: Tensor, sequence: int, length: int) -> Tensor:
        """Copy the keys, or values, of a sequence out of its pages: ``[1, kv_heads, length, width]``."""
        used = self.table[sequence, : -(-length // x.shape[2])].long()
        return x[used].transpose(0, 1).flatten(1, 2)[None, :, :length]


def compact(k: Tensor, v: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the keys that a mask keeps to the front, in order; the others become zeros, so that no result depends on padding.

    Args:
        k: keys, ``[batch, kv_heads, keys, head_dim]``.
        v: values, ``[batch, kv_heads, keys, value_dim]``.
        key_mask: ``[batch, keys]``, True where a key may be attended to.

    Returns:
        k and v reordered, and the rank of every position: the number of live keys at or before it, ``[batch, keys]``.
    """
    order = torch.argsort(key_mask, dim=1, descending=True, stable=True)
    dead = ~key_mask.gather(1, order)[:, None, :, None]
    order = order[:, None, :, None]
    take = [x.gather(2, order.expand(-1, x.shape[1], -1, x.shape[3])).masked_fill(dead, 0.0) for x in (k, v)]
    return take[0], take[1], key_mask.long().cumsum(1)


def _ranges(numbers: Sequence[int]) -> list[range]:
    """Cut integers into ranges of consecutive ones, which a device takes without a copy from the host."""
    ranges: list[range] = []
    for number in numbers:
        if ranges and ranges[-1].stop == number:
            ranges[-1] = range(ranges[-1].start, number + 1)
        else:
            ranges.append(range(number, number + 1))
    return ranges
