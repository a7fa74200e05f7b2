"""One attention problem, checked and in a normal form: what the methods are given."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Queries, keys and values, who may see whom, and the integers that fix every draw.

    Keys that a mask removes are already gone: live keys stand first, in order, and are counted by their *rank*. Without a
    mask rank and position are the same.

    Args:
        q: queries.
        k: keys, live ones first.
        v: values, in the order of the keys.
        scale: factor of the scores.
        causal: whether a query sees only keys at or before its own position.
        offset: position of the first query among the keys: 0 for upper-left alignment.
        rank: live keys at or before each position, or None where every key is live.
        seed: seed of every draw.
        layer: layer of the model, a counter of every draw.
        stored: the pages in which keys and values lie, one sequence's, or None where `k` and `v` are all there is.
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

    @property
    def num_queries(self) -> int:
        """Queries of each head."""
        return self.q.shape[2]

    @property
    def num_keys(self) -> int:
        """Keys of each head, dead ones included."""
        return self.k.shape[2]

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.q.shape[1] // max(1, self.k.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.q.device

    def storage(self) -> "tuple[Tensor, Tensor, Tensor | None]":
        """Tell where kernels read keys and values: rows of them, or pages with a table."""
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
    """Keys and values in pages, and which pages hold which sequence.

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
    """Move the keys that a mask keeps to the front, in order; the others become zeros, so that nothing depends on padding.

    Args:
        k: keys, ``[batch, kv_heads, keys, head_dim]``.
        v: values, ``[batch, kv_heads, keys, value_dim]``.
        key_mask: ``[batch, keys]``, True where a key may be attended to.

    Returns:
        k and v reordered, and the rank of every position: live keys at or before it, ``[batch, keys]``.
    """
    order = torch.argsort(key_mask, dim=1, descending=True, stable=True)
    dead = ~key_mask.gather(1, order)[:, None, :, None]
    order = order[:, None, :, None]
    take = [x.gather(2, order.expand(-1, x.shape[1], -1, x.shape[3])).masked_fill(dead, 0.0) for x in (k, v)]
    return take[0], take[1], key_mask.long().cumsum(1)
