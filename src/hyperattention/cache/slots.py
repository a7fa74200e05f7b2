"""Slots of a cache with the data that policies read and compress."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.coreset import Coreset


@dataclass(frozen=True)
class CacheSlots:
    """Weighted keys and values, the position of each in the text, and the attention that each has received.

    Args:
        k: keys, positions applied.
        v: values.
        log_weight: natural log of the number of keys that each stands for; -inf for an empty slot.
        position: position of each key in the sequence.
        score: attention that the key got so far, summed over queries; zeros if the policy does not read it.
    """

    k: Float[Tensor, "batch kv_heads slots head_dim"]
    v: Float[Tensor, "batch kv_heads slots value_dim"]
    log_weight: Float[Tensor, "batch kv_heads slots"]
    position: Int[Tensor, "batch kv_heads slots"]
    score: Float[Tensor, "batch kv_heads slots"]

    @property
    def num_slots(self) -> int:
        """Slots of each head, empty ones included."""
        return self.k.shape[2]

    @property
    def live(self) -> Tensor:
        """Return which slots hold a key, ``[batch, kv_heads, slots]``."""
        return self.log_weight > -torch.inf

    @property
    def coreset(self) -> Coreset:
        """Return the coreset of these slots, for attention."""
        return Coreset(self.k, self.v, self.log_weight)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """List the tensors, in the order of the arguments."""
        return self.k, self.v, self.log_weight, self.position, self.score

    def part(self, begin: int, end: int) -> "CacheSlots":
        """Keep a range of slots, as views.

        Args:
            begin: the first slot.
            end: end of the range.

        Returns:
            the slots of the range.
        """
        return CacheSlots(*(x[:, :, begin:end] for x in self.tensors))

    def take(
        self, index: Int[Tensor, "batch kv_heads num"], log_weight: Float[Tensor, "batch kv_heads num"]
    ) -> "CacheSlots":
        """Copy some slots, with new weights.

        Args:
            index: the slots, for each head.
            log_weight: their new log-weights; -inf makes a slot empty.

        Returns:
            the slots, in the order of `index`.
        """
        # an empty slot has weight 0, but 0 times infinity or NaN would be NaN
        wide = index[..., None]
        k, v = (x.gather(2, wide.expand(-1, -1, -1, x.shape[3])) for x in (self.k, self.v))
        position, score = (x.gather(2, index) for x in (self.position, self.score))
        return CacheSlots(k, v, log_weight.to(self.log_weight.dtype), position, score)

    def rows(self, index: Int[Tensor, " rows"]) -> "CacheSlots":
        """Copy some rows of the batch, as beam search reorders them.

        Args:
            index: the rows; repeats are allowed.

        Returns:
            the slots of these rows.
        """
        return CacheSlots(*(x.index_select(0, index.to(x.device)) for x in self.tensors))


def joined(parts: Sequence[CacheSlots]) -> CacheSlots:
    """Concatenate slots of the same heads.

    Args:
        parts: at least one.

    Returns:
        all of them, in the order given.
    """
    return CacheSlots(*(torch.cat(each, 2) for each in zip(*(part.tensors for part in parts), strict=True)))


def live_first(held: CacheSlots, end: int) -> CacheSlots:
    """Move the empty slots of padded rows after the other slots, before `end`, so that sinks are the first real keys.

    Args:
        held: the slots.
        end: end of the range within which slots move.

    Returns:
        all slots.
    """
    live = held.live[:, :, :end]
    if bool(live.all()):
        return held
    order = torch.argsort(live.to(torch.uint8), dim=-1, descending=True, stable=True)
    index = torch.cat(
        [order, torch.arange(end, held.num_slots, dtype=torch.int64, device=order.device).expand(*order.shape[:2], -1)], -1
    )
    return held.take(index, held.log_weight.gather(2, index))
