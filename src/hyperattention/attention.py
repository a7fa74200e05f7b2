"""The front door: the arguments of torch's scaled_dot_product_attention, and a method."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hyperattention.compiled import attend_opaque, is_opaque
from hyperattention.error.audit import ErrorReport
from hyperattention.error.audit import audit as judge
from hyperattention.error.tolerance.ladder import Ladder, check_tolerance
from hyperattention.error.tolerance.report import ToleranceReport
from hyperattention.error.tolerance.within import attend_within, exact_report
from hyperattention.exact import exact_attention
from hyperattention.inputs import (
    autocast_device,
    check_inputs,
    check_masks,
    check_tensors,
    dense_mask,
    key_mask_of,
    narrowed,
)
from hyperattention.methods.base import Approach
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.default import default_method
from hyperattention.methods.exact import Exact
from hyperattention.problem import Problem, compact
from hyperattention.types import Partial


def attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    attn_mask: Shaped[Tensor, "..."] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    method: Approach | Ladder | None = None,
    tolerance: float | None = None,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    seed: int = 0,
    layer: int = 0,
    causal_align: str = "upper_left",
    audit: int | None = None,
    return_lse: bool = False,
    return_standard_error: bool = False,
    check_finite: bool = False,
) -> Tensor | tuple[Tensor | ErrorReport | ToleranceReport, ...]:
    """Attend, exactly or by a method that scores a bounded number of keys a query.

    out_i = sum_j softmax_j(q_i . k_j * scale) v_j, over the keys that query i may see. A query with nothing to attend to
    gets 0, with lse -inf and no gradient. Gradients are those of the forward pass with the selection (indices and
    log-weights) held fixed, through lse too; for weights that depend on the data that is the unbiased choice. Arguments that
    do not fit raise ValueError or TypeError, what is not supported NotImplementedError; the message says what to do.

    A standard error, ``[batch, heads, queries]``, estimates (E ||out_i - exact_i||^2)^(1/2) from the draws alone, at about
    the cost of attending again; divide by ||out_i|| for a relative one. ||out_i - exact_i|| stays within twice of it in 90
    to 99 rows of 100 where values are single numbers, and in more where they have many, as long as no single key that draws
    seldom hit carries the row: such a key, when missed, is in no standard error, and an audit is what finds it. It is 0 for
    exact attention and wherever all keys were listed, has no gradient, and is refused for methods that drop keys.

    Args:
        query: queries.
        key: keys; ``heads`` must be a multiple of ``kv_heads``, and equal to it unless `enable_gqa`.
        value: values.
        attn_mask: as in SDPA: boolean (True = attend) or added to the scores, broadcastable to
            ``[batch, heads, queries, keys]``. A boolean ``[batch, 1, 1, keys]`` is a key mask; any other is dense, which
            only exact attention reads.
        dropout_p: must be 0.
        is_causal: whether query i sees only keys at or before its position.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.
        enable_gqa: whether several query heads may share a kv head.
        method: what runs. None runs `default_method`, which is exact below the crossover; any other runs as written. With
            `tolerance` it is left out, or a `Ladder` of methods to climb in place of the default one.
        tolerance: mean relative row error allowed each head of this output, in (0, 1). Each head then gets, of ever dearer
            methods, the cheapest that is likely enough and then certified at 95% confidence, or exact attention. What rows
            err by above 1 is estimated, not bounded: rare huge errors can hide. Over many calls vary `seed`, or they fail
            together. A `ToleranceReport`, returned as well, says what ran and what it took. Decided by values, so a compiled
            graph breaks there. See `attend_within`.
        key_mask: True where a key may be attended to; combines with `is_causal`.
        seed: seed of every draw, in [0, 2**63).
        layer: layer of the model, so that layers draw independently.
        causal_align: ``"upper_left"`` (query i stands at key i, as in SDPA) or ``"lower_right"`` (the last query stands at
            the last key: chunked prefill, decoding).
        audit: rows to check against exact attention; the report is returned as well.
        return_lse: whether to return the log-sum-exp of every row, natural logarithm, float32 or float64.
        return_standard_error: whether to return the standard error of every row, as its own draws tell it.
        check_finite: whether to refuse NaN and infinity; they are otherwise passed on, never cleaned.

    Returns:
        out ``[batch, heads, queries, value_dim]``, or a tuple ``(out[, lse][, standard_error][, audit's report]
        [, tolerance's report])`` as asked for.
    """
    check_tensors(query=query, key=key, value=value)
    query, key, value = narrowed(query, key, value)
    attn_mask = None if attn_mask is None else narrowed(attn_mask)[0]
    check_inputs(query, key, value, enable_gqa=enable_gqa, dropout_p=dropout_p, seed=seed, check_finite=check_finite)
    check_masks(query, key, attn_mask, key_mask, is_causal=is_causal, causal_align=causal_align, audit=audit)
    dense = dense_mask(attn_mask)
    live = key_mask_of(attn_mask, key_mask, key)
    check_tolerance(tolerance, method, return_standard_error)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    within: tuple[ToleranceReport, ...] = ()
    with torch.autocast(autocast_device(query), enabled=False):
        if dense is not None:
            within = () if tolerance is None else (exact_report(query, key, tolerance),)
            run = method if isinstance(method, Approach) else Exact()
            partial = _attend_dense(query, key, value, dense, live, run, scale)
            error = torch.zeros_like(partial.lse) if return_standard_error else None
        else:
            run = method if isinstance(method, Approach) else _default(query, key)
            as_it_is = tolerance is None and run.follows_masks
            problem = _problem(query, key, value, live, scale, is_causal, causal_align, seed, layer, as_it_is)
            if tolerance is not None:
                partial, report = attend_within(problem, tolerance, _ladder(method), lse=return_lse)
                within, run, error = (report,), ByHead(report.methods), None
            else:
                partial, error = _attend(problem, run, return_lse, return_standard_error)
    # exact attention returns rows as accumulated
    out = (partial.out if isinstance(partial, Partial) else partial).to(query.dtype)
    results: tuple[Tensor | ErrorReport | ToleranceReport, ...] = (out,)
    if return_lse and isinstance(partial, Partial):
        results += (partial.lse,)
    if error is not None:
        results += (error,)
    if audit is not None:
        results += (
            judge(
                query, key, value, out, rows=audit, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
                key_mask=live, causal_align=causal_align, seed=seed, method=run,
            ),
        )  # fmt: skip
    results += within
    return results if len(results) > 1 else out


def _default(query: Tensor, key: Tensor) -> Approach:
    return default_method(key.shape[2], num_queries=query.shape[2], device=key.device)


def _ladder(method: Approach | Ladder | None) -> Ladder | None:
    return method if isinstance(method, Ladder) else None


def _problem(query, key, value, live, scale, is_causal, causal_align, seed, layer, as_it_is) -> Problem:
    """Bring the arguments into normal form: dead keys gone or masked, the first query's position known."""
    offset = key.shape[2] - query.shape[2] if causal_align == "lower_right" else 0
    if as_it_is:
        return Problem(query, key, value, scale, is_causal, offset, None, seed, layer, key_mask=live)
    rank = None
    if live is not None:
        key, value, rank = compact(key, value, live)
    return Problem(query, key, value, scale, is_causal, offset, rank, seed, layer)


def _attend(problem: Problem, method: Approach, with_lse: bool, with_error: bool) -> tuple[Partial | Tensor, Tensor | None]:
    """Run a method for what is asked for: the output alone is cheaper where heads are exact."""
    if torch.compiler.is_compiling() and not isinstance(method, Exact) and is_opaque(method):
        return attend_opaque(problem, method, with_lse, with_error)
    if with_error:
        return method.attend_with_error(problem)
    return (method.attend(problem) if with_lse else method.output(problem)), None


def _attend_dense(query, key, value, mask, live, method: Approach, scale: float) -> Partial:
    """Run exact attention under a dense mask, which no list of keys can express."""
    if not isinstance(method, Exact) and key.shape[2]:
        raise NotImplementedError(
            f"{method!r} cannot follow a dense attn_mask of shape {tuple(mask.shape)}: lists are chosen by position. "
            "Use key_mask for padding, varlen_attention for packed sequences, or method=Exact()"
        )
    return exact_attention(query, key, value, scale=scale, attn_mask=mask, key_mask=live)
