"""A coreset: a few weighted keys and values that replace many, and attention over them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.kernels import coreset as coreset_torch
from hyperattention.kernels.decode.operator import decode_coreset, decodes_fused
from hyperattention.kernels.list.operator import list_attention
from hyperattention.merge import without_sinks
from hyperattention.transforms import refuse_transforms, scale_of
from hyperattention.types import Partial, Runs, Selection

# queries of a head that share one list
_TILE = 64


@dataclass(frozen=True)
class Coreset:
    """Weighted keys and values that replace a larger set of keys and values.

    out_i = sum_s w_s exp(scale q_i . k_s) v_s / sum_s w_s exp(scale q_i . k_s)

    A key that stands for itself has log-weight 0, a key that stands for n keys has log n, and an empty slot has -inf. Empty
    slots let heads and batch rows hold different numbers of keys. Keys and values in an empty slot have no effect, but must
    be finite.

    Source: coresets for attention, as in Zandieh et al., 2024 (arXiv:2402.06082), SubGen; Han et al., 2025
    (arXiv:2502.07861), BalanceKV.   Differs: one weight serves numerator and denominator.
    Cost: `num_slots` products per query and head.   Guarantee: exact if no key was dropped; otherwise the guarantee of the
    algorithm that made the coreset.

    Args:
        k: keys.
        v: their values.
        log_weight: natural log of the number of keys that each key stands for.

    Raises:
        ValueError: if the shapes do not fit together.
    """

    k: Float[Tensor, "batch kv_heads slots head_dim"]
    v: Float[Tensor, "batch kv_heads slots value_dim"]
    log_weight: Float[Tensor, "batch kv_heads slots"]

    def __post_init__(self) -> None:
        shapes = tuple(self.k.shape[:3]), tuple(self.v.shape[:3]), tuple(self.log_weight.shape)
        if self.k.ndim != 4 or self.v.ndim != 4 or len(set(shapes)) != 1:
            raise ValueError(
                f"keys {tuple(self.k.shape)}, values {tuple(self.v.shape)} and log-weights {tuple(self.log_weight.shape)} "
                "do not fit: keys and values must be [batch, kv_heads, slots, width], log-weights [batch, kv_heads, slots]"
            )

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> "Coreset":
        """Make a coreset that keeps every key with weight 1.

        Args:
            k: keys, ``[batch, kv_heads, keys, head_dim]``.
            v: their values.

        Returns:
            a coreset of weights 1.
        """
        return cls(k, v, torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device))

    @property
    def num_slots(self) -> int:
        """Slots of each head, empty ones included."""
        return self.k.shape[2]

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys, values and weights."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.log_weight))

    def attend(
        self,
        q: Float[Tensor, "batch heads queries head_dim"],
        *,
        scale: float | None = None,
        own: int = 0,
        softcap: float | None = None,
        sinks: Float[Tensor, " heads"] | None = None,
    ) -> Partial:
        """Compute attention over the coreset.

        Args:
            q: queries; query head h reads kv head h // (heads // kv_heads).
            scale: factor of the scores; 1 / sqrt(head_dim) if None.
            own: number of last slots that hold the keys of these queries themselves; it equals the number of queries, and
                each query sees those slots up to its own. 0 if every query sees every slot.
            softcap: bound of the scores: softcap * tanh(score / softcap), applied before log-weights are added; None for no
                bound. A softcap has no gradient.
            sinks: logit of each query head that belongs to no key, whose share of the softmax is dropped; None for none.

        Returns:
            the rows and their log-sum-exp; `merge` can combine them with attention over other keys.

        Raises:
            ValueError: if the queries do not fit the heads or `own`, or a gradient of log-weights or under a softcap is
                asked for.
        """
        batch, kv_heads, slots = self.log_weight.shape
        heads, queries = q.shape[1], q.shape[2]
        if q.shape[0] != batch or q.shape[3] != self.k.shape[3] or heads % max(1, kv_heads):
            raise ValueError(
                f"queries of shape {tuple(q.shape)} do not fit keys of shape {tuple(self.k.shape)}: batch and width must be "
                "the same, and the query heads a multiple of the kv heads"
            )
        if own not in (0, queries) or own > slots:
            raise ValueError(f"own={own} with {queries} queries and {slots} slots: own must be 0 or the number of queries")
        factor = scale_of(scale, self.k.shape[3])
        refuse_transforms("attention to a coreset", q, self.k, self.v, self.log_weight)
        if torch.is_grad_enabled() and self.log_weight.requires_grad:
            raise ValueError("log-weights have no gradient: detach them, or attend under torch.no_grad()")
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, self.k, self.v))
        if softcap is not None and learning:
            raise ValueError(f"softcap={softcap} has no gradient: attend under torch.no_grad()")
        if decodes_fused(q, self.k, self.v):
            given = (q, self.k, self.v, self.log_weight, None, sinks)
            return Partial(*decode_coreset(*given, factor, own > 1, softcap))
        rows = q.unflatten(1, (kv_heads, heads // kv_heads)).flatten(0, 1)  # [lists, group, queries, head_dim]
        k, v, weight = (_joined(x) for x in (self.k, self.v, self.log_weight))
        if softcap is not None or (q.device.type == "cpu" and not learning):
            out, lse = coreset_torch.forward(rows, k, v, weight, factor, causal=own > 1, softcap=softcap)
        else:
            out, lse = self._by_lists(rows, k, v, factor, own)
        part = Partial(*(x.unflatten(0, (batch, kv_heads)).flatten(1, 2) for x in (out, lse)))
        return part if sinks is None else without_sinks(part, sinks)

    def _by_lists(self, rows: Tensor, k: Tensor, v: Tensor, scale: float, own: int) -> tuple[Tensor, Tensor]:
        """Compute attention by the list kernel, which has gradients and a GPU implementation."""
        group, queries = rows.shape[1:3]
        size = max(1, min(_TILE, queries))
        tiles = -(-queries // size)
        # [lists, tiles, group, size, head_dim]
        q = pad(rows, (0, 0, 0, tiles * size - queries)).unflatten(2, (tiles, size)).transpose(1, 2)
        found = list_attention(q, k, v, self._selection(queries, tiles, group, own), scale)
        out, lse = (x.transpose(1, 2).flatten(2, 3)[:, :, :queries] for x in found)
        return out, lse

    def _selection(self, queries: int, tiles: int, group: int, own: int) -> Selection:
        """List every slot for every tile."""
        slots, lists, device = self.num_slots, self.log_weight.shape[0] * self.log_weight.shape[1], self.k.device
        size = max(1, min(_TILE, queries))
        row = torch.arange(tiles * size, dtype=torch.int64, device=device).view(tiles, size)
        limit = row + (slots - queries + 1) if own else torch.full_like(row, slots)
        limit = limit.masked_fill(row >= queries, 0)
        first = torch.arange(slots, dtype=torch.int64, device=device).expand(lists, tiles, -1)
        weight = self.log_weight.flatten(0, 1)[:, None].expand(-1, tiles, -1)
        zero = torch.zeros(lists, tiles, dtype=torch.int64, device=device)
        runs = Runs(first, 1, weight, zero, zero + slots, causal=own > 1)
        return Selection(
            (runs,),
            limit[None, :, None].expand(lists, -1, group, -1).flatten(2),
            torch.arange(lists, dtype=torch.int64, device=device),
        )


def _joined(x: Tensor) -> Tensor:
    """Join batch and heads; a view where the slots are the front of a longer buffer."""
    batch, heads = x.shape[:2]
    if x.stride(0) == heads * x.stride(1):
        return x.as_strided((batch * heads, *x.shape[2:]), x.stride()[1:], x.storage_offset())
    return x.flatten(0, 1)


def join(coresets: Sequence[Coreset]) -> Coreset:
    """Join coresets of disjoint keys: attention then runs over their union, with unchanged weights.

    Args:
        coresets: at least one, over the same batch and heads; they may differ in their numbers of slots.

    Returns:
        their union, slots in the order given.

    Raises:
        ValueError: if `coresets` is empty, or the coresets differ in batch, heads or widths.
    """
    shapes = {(tuple(c.k.shape[:2]), c.k.shape[3], c.v.shape[3]) for c in coresets}
    if len(shapes) != 1:
        raise ValueError(
            f"coresets over {sorted(shapes)} cannot be joined: give at least one, all with the same batch, heads and widths"
        )
    return Coreset(*(torch.cat(parts, 2) for parts in zip(*((c.k, c.v, c.log_weight) for c in coresets), strict=True)))


def of_heads(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Coreset:
    """Make a coreset with a different number of keys in each kv head: shorter heads end in empty slots.

    Args:
        parts: for each kv head its keys ``[slots, head_dim]``, values ``[slots, value_dim]`` and log-weights ``[slots]``.

    Returns:
        a coreset with batch size 1.

    Raises:
        ValueError: if `parts` is empty, or the tensors of one head differ in length.
    """
    if not parts or any(len({len(x) for x in part}) != 1 for part in parts):
        raise ValueError(
            f"lengths {[tuple(len(x) for x in part) for part in parts]} of (keys, values, log-weights): "
            "give at least one head, and three tensors of equal length for each"
        )
    slots = max(len(k) for k, _, _ in parts)
    k, v, log_weight = (
        torch.stack([pad(x, (0, 0) * (x.ndim - 1) + (0, slots - len(x)), value=fill) for x in column])[None]
        for column, fill in zip(zip(*parts, strict=True), (0.0, 0.0, -torch.inf), strict=True)
    )
    return Coreset(k, v, log_weight)
