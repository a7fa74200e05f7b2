"""Packed sequences: attention within each sequence, without a dense mask."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.attention import attention, measured_attention
from hyperattention.error.tolerance.ladder import Ladder, check_tolerance
from hyperattention.inputs import autocast_device, check_inputs, check_masks, check_tensors, narrowed
from hyperattention.kernels.backend import triton_reads
from hyperattention.layouts.ragged import Packed, ragged_attention
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.default import default_method
from hyperattention.methods.exact import Exact
from hyperattention.result import AttentionResult, SequencesResult
from hyperattention.transforms import scale_of


def varlen_attention(
    query: Float[Tensor, "1 heads queries head_dim"],
    key: Float[Tensor, "1 kv_heads keys head_dim"],
    value: Float[Tensor, "1 kv_heads keys value_dim"],
    cu_seq_q: Int[Tensor, " sequences_plus_one"],
    cu_seq_k: Int[Tensor, " sequences_plus_one"] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    method: AttentionMethod | Ladder | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    layer: int = 0,
    causal_align: str = "upper_left",
) -> Float[Tensor, "1 heads queries value_dim"]:
    """Compute attention within each of several packed sequences, without a dense mask.

    On a GPU, without gradients, all sequences with exact attention share one launch of the list kernel; each other sequence
    has its own launch. Reading `cu_seq_q` and `cu_seq_k` from a GPU makes the host wait.

    Args:
        query: queries of all sequences, end to end.
        key: keys of all sequences.
        value: values of all sequences.
        cu_seq_q: where each sequence's queries begin, and where the last ends: 0, n_1, n_1 + n_2, ...
        cu_seq_k: the same for keys; equal to `cu_seq_q` if None.
        is_causal: whether a query sees only keys of its sequence at or before its position.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.
        enable_gqa: whether several query heads may share a kv head.
        method: the method for each sequence; None decides by the length of each sequence.
        tolerance: mean relative row error allowed for each head of each sequence, in (0, 1).
        seed: seed of every draw.
        layer: layer of the model.
        causal_align: as for `attention`, within each sequence.

    Returns:
        the outputs, end to end. Sequences that do not cover all queries and keys raise ValueError.
    """
    check_tolerance(tolerance, method)
    options = _Options(is_causal, scale, enable_gqa, method, tolerance, seed, layer, causal_align)
    packed = _checked(query, key, value, cu_seq_q, cu_seq_k, options)
    together = packed.exact_together()
    outs = [
        attention(*packed.tensors(number), **options.shared(packed.runs[number]))
        if number not in together
        else together[number][0]
        for number in range(packed.count)
    ]
    return torch.cat(outs, 2) if outs else packed.nothing()[0]


def measured_varlen_attention(
    query: Float[Tensor, "1 heads queries head_dim"],
    key: Float[Tensor, "1 kv_heads keys head_dim"],
    value: Float[Tensor, "1 kv_heads keys value_dim"],
    cu_seq_q: Int[Tensor, " sequences_plus_one"],
    cu_seq_k: Int[Tensor, " sequences_plus_one"] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    method: AttentionMethod | Ladder | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    layer: int = 0,
    causal_align: str = "upper_left",
    standard_error: bool = False,
    audit: int | None = None,
) -> SequencesResult:
    """Compute attention as `varlen_attention` does; return the log-sum-exp and the reports asked for, one per sequence.

    Each sequence is measured separately: the rows of an audit are rows per sequence, and a tolerance holds for each head of
    each sequence with its own 95% confidence. A sequence without queries or keys has no audit.

    Args:
        query: queries. This and the next twelve arguments are as for `varlen_attention`.
        key: keys.
        value: values.
        cu_seq_q: edges of the queries.
        cu_seq_k: edges of the keys.
        is_causal: whether a query sees only keys of its sequence at or before its position.
        scale: factor of the scores.
        enable_gqa: whether several query heads may share a kv head.
        method: the method for each sequence.
        tolerance: mean relative row error allowed for each head of each sequence.
        seed: seed of every draw.
        layer: layer of the model.
        causal_align: as for `attention`.
        standard_error: whether to estimate the standard error of every row.
        audit: rows of each sequence to check against exact attention; None for no audit.

    Returns:
        tensors in the layout of the queries, and one report per sequence.
    """
    check_tolerance(tolerance, method, standard_error)
    options = _Options(is_causal, scale, enable_gqa, method, tolerance, seed, layer, causal_align)
    packed = _checked(query, key, value, cu_seq_q, cu_seq_k, options)
    together = packed.exact_together() if audit is None and not standard_error else {}
    results = [
        AttentionResult(*together[number])
        if number in together
        else measured_attention(
            *packed.tensors(number),
            **options.shared(packed.runs[number]),
            standard_error=standard_error,
            audit=audit if packed.holds_pairs(number) else None,
        )
        for number in range(packed.count)
    ]
    if not results:
        return SequencesResult(*packed.nothing())
    errors = [each.standard_error for each in results if each.standard_error is not None]
    return SequencesResult(
        out=torch.cat([each.out for each in results], 2),
        lse=torch.cat([each.lse for each in results], 2),
        standard_error=torch.cat(errors, 2) if standard_error else None,
        audit=() if audit is None else tuple(each.audit for each in results),
        tolerance=tuple(each.tolerance for each in results if each.tolerance is not None),
    )


@dataclass(frozen=True)
class _Options:
    """The options of a call, equal for every sequence."""

    is_causal: bool
    scale: float | None
    enable_gqa: bool
    method: AttentionMethod | Ladder | None
    tolerance: float | None
    seed: int
    layer: int
    causal_align: str

    def shared(self, method: AttentionMethod | Ladder | None) -> dict:
        """Arguments of `attention` for a sequence with this method."""
        return {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "enable_gqa": self.enable_gqa,
            "method": method,
            "tolerance": self.tolerance,
            "seed": self.seed,
            "layer": self.layer,
            "causal_align": self.causal_align,
        }


@dataclass(frozen=True)
class _Sequences:
    """Checked packed queries, keys and values, with the edges and the method of each sequence."""

    query: Tensor
    key: Tensor
    value: Tensor
    edges_q: list[int]
    edges_k: list[int]
    runs: list[AttentionMethod | Ladder | None]
    options: _Options

    @property
    def count(self) -> int:
        return len(self.runs)

    def holds_pairs(self, number: int) -> bool:
        """Whether a sequence has a query and a key."""
        return all(edges[number + 1] > edges[number] for edges in (self.edges_q, self.edges_k))

    def tensors(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one sequence."""
        (q0, q1), (k0, k1) = (edges[number : number + 2] for edges in (self.edges_q, self.edges_k))
        return self.query[:, :, q0:q1], self.key[:, :, k0:k1], self.value[:, :, k0:k1]

    def nothing(self) -> tuple[Tensor, Tensor]:
        """Output and lse of a call without sequences."""
        lse = self.query.new_empty(self.query.shape[:3], dtype=torch.promote_types(self.query.dtype, torch.float32))
        return self.query.new_empty(*self.query.shape[:3], self.value.shape[-1]), lse

    def exact_together(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Compute exact sequences in one launch, if there are several on a GPU: out and lse of each."""
        # with gradients torch's own kernel is faster for all but short sequences
        tensors = (self.query, self.key, self.value)
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        exact = [number for number, run in enumerate(self.runs) if isinstance(run, Exact)]
        if learning or len(exact) < 2 or self.options.tolerance is not None or not triton_reads(*tensors):
            return {}
        count, keys = ([edges[s + 1] - edges[s] for s in exact] for edges in (self.edges_q, self.edges_k))
        lower_right = self.options.causal_align == "lower_right"
        offset = [k - c if lower_right else 0 for k, c in zip(keys, count, strict=True)]
        packed = Packed([self.edges_q[s] for s in exact], count, keys, offset, self.options.is_causal)
        scale = scale_of(self.options.scale, self.query.shape[-1])
        with torch.autocast(autocast_device(self.query), enabled=False):
            out, lse = ragged_attention(
                self.query[0].transpose(0, 1),
                self.key[0],
                self.value[0],
                packed,
                scale,
                first_key=[self.edges_k[s] for s in exact],
                kv_heads=self.key.shape[1],
            )
        each = zip(out.transpose(0, 1).split(count, 1), lse.transpose(0, 1).split(count, 1), strict=True)
        return {s: (o[None], m[None]) for s, (o, m) in zip(exact, each, strict=True)}


def _checked(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, options: _Options
) -> _Sequences:
    """Check a packed call, and choose the method of each sequence by its length."""
    check_tensors(query=query, key=key, value=value)
    query, key, value = narrowed(query, key, value)
    check_inputs(query, key, value, enable_gqa=options.enable_gqa, dropout_p=0.0, seed=options.seed, check_finite=False)
    check_masks(query, key, None, None, is_causal=options.is_causal, causal_align=options.causal_align)
    edges_q, edges_k = cu_seq_q.tolist(), (cu_seq_q if cu_seq_k is None else cu_seq_k).tolist()
    for name, edges, count in (("cu_seq_q", edges_q, query.shape[2]), ("cu_seq_k", edges_k, key.shape[2])):
        if not edges or edges[0] != 0 or edges[-1] != count or edges != sorted(edges):
            raise ValueError(f"{name} is {edges}: it must rise from 0 to the number of tokens, {count}")
    if len(edges_q) != len(edges_k):
        raise ValueError(f"cu_seq_q names {len(edges_q) - 1} sequences and cu_seq_k {len(edges_k) - 1}: give one edge each")
    by_length = options.method is None and options.tolerance is None
    runs = [
        default_method(k1 - k0, num_queries=q1 - q0, device=key.device) if by_length else options.method
        for (q0, q1), (k0, k1) in zip(pairwise(edges_q), pairwise(edges_k), strict=True)
    ]
    return _Sequences(query, key, value, edges_q, edges_k, runs, options)
