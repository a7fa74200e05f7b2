"""The public functions `attention` and `measured_attention`: torch's scaled_dot_product_attention (SDPA), and a method."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hyperattention.call import Call, Masking, checked_call
from hyperattention.compiled import attend_opaque, is_opaque
from hyperattention.error.audit import audit as judge
from hyperattention.error.report import ErrorReport
from hyperattention.error.tolerance.ladder import Ladder, check_tolerance
from hyperattention.error.tolerance.report import ToleranceReport
from hyperattention.error.tolerance.within import attend_within, exact_report
from hyperattention.exact import exact_attention
from hyperattention.inputs import autocast_device
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.default import default_method
from hyperattention.methods.exact import Exact
from hyperattention.result import AttentionResult
from hyperattention.transforms import refuse_transforms
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
    method: AttentionMethod | Ladder | None = None,
    tolerance: float | None = None,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    seed: int = 0,
    layer: int = 0,
    causal_align: str = "upper_left",
    check_finite: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Compute attention, exactly or by a method that scores a bounded number of keys for each query.

    out_i = sum_j softmax_j(q_i . k_j * scale) v_j, over the keys that query i may see. A query that sees no key gets output
    0 and no gradient. Gradients are those of the forward pass with the selection (indices and log-weights) held fixed; for
    weights that depend on the data this choice is unbiased. Arguments that do not fit raise ValueError or TypeError;
    unsupported requests raise NotImplementedError. The message names the remedy.

    For the log-sum-exp, standard errors, an audit or the report of a tolerance, call `measured_attention`.

    Methods that list keys support first derivatives, by backward only. Forward mode (torch.func.jvp), torch.func.grad,
    torch.func.vmap and second derivatives raise NotImplementedError; exact attention supports them as far as torch's kernels
    do.

    A NaN key makes exactly those output rows NaN that list this key. Under exact attention, as in SDPA, these are all rows
    that see the key; under other methods they are some of them, so a row can be finite where SDPA's row is NaN. A NaN value
    also reaches earlier rows of a tile that lists it, because 0 times NaN is NaN. `check_finite` refuses such input.

    Args:
        query: queries.
        key: keys; ``heads`` must be a multiple of ``kv_heads``, and equal to it unless `enable_gqa`.
        value: values.
        attn_mask: as in SDPA: boolean (True = attend) or added to the scores, broadcastable to
            ``[batch, heads, queries, keys]``. A boolean ``[batch, 1, 1, keys]`` is a key mask; any other mask is dense, and
            only exact attention reads a dense mask.
        dropout_p: must be 0.
        is_causal: whether query i sees only keys at or before its position.
        scale: factor of the scores, a number; 1 / sqrt(head_dim) if None. To learn a scale, multiply `query` by it instead.
        enable_gqa: whether several query heads may share a kv head.
        method: the method that runs. None runs `default_method`, which is exact below the crossover length. With
            `tolerance`, leave `method` out or give a `Ladder` of methods, from which the cheapest that suffices is chosen.
        tolerance: mean relative row error allowed for each head of this output, in (0, 1): see `measured_attention`.
        key_mask: True where a key may be attended to; combines with `is_causal`.
        seed: seed of every draw, in [0, 2**63).
        layer: layer of the model, so that layers draw independently.
        causal_align: ``"upper_left"`` (query i stands at key i, as in SDPA) or ``"lower_right"`` (the last query stands at
            the last key: chunked prefill, decoding).
        check_finite: whether to refuse NaN and infinity; without this check they are passed on unchanged.

    Returns:
        the output, in the dtype of the query.
    """
    check_tolerance(tolerance, method)
    call = checked_call(
        query,
        key,
        value,
        Masking(attn_mask, key_mask, is_causal, causal_align),
        dropout_p=dropout_p,
        scale=scale,
        enable_gqa=enable_gqa,
        seed=seed,
        layer=layer,
        check_finite=check_finite,
    )
    return _attend(call, method, tolerance, _Wanted(lse=False, standard_error=False, audit=False)).out


def measured_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    attn_mask: Shaped[Tensor, "..."] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    method: AttentionMethod | Ladder | None = None,
    tolerance: float | None = None,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    seed: int = 0,
    layer: int = 0,
    causal_align: str = "upper_left",
    check_finite: bool = False,
    standard_error: bool = False,
    audit: int | None = None,
) -> AttentionResult:
    """Compute attention as `attention` does; return the output, its log-sum-exp and the reports asked for, each by name.

    **Audit.** Some rows of this output are also computed exactly, and their error is reported with a 95% interval: see
    `hyperattention.audit`.

    **Standard error.** Estimates (E ||out_i - exact_i||^2)^(1/2) from the draws alone, at about the cost of attending again;
    divide by ||out_i|| for a relative error. ||out_i - exact_i|| is at most twice the standard error in 90 to 99 of 100 rows
    if value_dim is 1, and in more rows if value_dim is larger. This does not hold for a row whose weight is mostly on one
    key that the draws seldom hit: if that key is missed, the standard error is too small, and only an audit finds the error.
    The standard error is 0 for exact attention and wherever all keys were listed. It has no gradient, and methods that drop
    keys refuse it.

    **Tolerance.** Each head gets the cheapest method of a ladder that is likely to suffice and is then certified at 95%
    confidence, or exact attention. `ToleranceReport` lists what the certificate does not cover. The choice depends on tensor
    values, so it breaks a compiled graph. See `attend_within`.

    Args:
        query: queries. This and the next fourteen arguments are as for `attention`.
        key: keys.
        value: values.
        attn_mask: SDPA's mask.
        dropout_p: must be 0.
        is_causal: whether query i sees only keys at or before its position.
        scale: factor of the scores.
        enable_gqa: whether several query heads may share a kv head.
        method: the method that runs.
        tolerance: mean relative row error allowed for each head of this output, in (0, 1).
        key_mask: True where a key may be attended to.
        seed: seed of every draw.
        layer: layer of the model.
        causal_align: alignment of the diagonal, ``"upper_left"`` or ``"lower_right"``.
        check_finite: whether to refuse NaN and infinity.
        standard_error: whether to estimate the standard error of every row; not allowed with `tolerance`, whose report
            bounds the error.
        audit: rows to check against exact attention; None for no audit.

    Returns:
        the output, its log-sum-exp, and the reports asked for.

    Raises:
        ValueError: if an audit is asked for under a dense mask.
    """
    check_tolerance(tolerance, method, standard_error)
    call = checked_call(
        query,
        key,
        value,
        Masking(attn_mask, key_mask, is_causal, causal_align),
        dropout_p=dropout_p,
        scale=scale,
        enable_gqa=enable_gqa,
        seed=seed,
        layer=layer,
        check_finite=check_finite,
    )
    if audit is not None and call.dense is not None:
        raise ValueError(f"audit={audit} cannot follow a dense attn_mask, which only exact attention reads: leave audit out")
    ran = _attend(call, method, tolerance, _Wanted(lse=True, standard_error=standard_error, audit=audit is not None))
    assert ran.lse is not None  # asked for
    report = None if audit is None else _audit(call, ran, audit)
    return AttentionResult(ran.out, ran.lse, ran.standard_error, report, ran.report, ran.clamped)


@dataclass(frozen=True)
class _Wanted:
    """The results that a call wants besides the output.

    Args:
        lse: whether the log-sum-exp is wanted; without it exact heads are sometimes cheaper.
        standard_error: whether the standard error of every row is wanted.
        audit: whether some rows are compared with exact rows afterwards.
    """

    lse: bool
    standard_error: bool
    audit: bool


@dataclass(frozen=True)
class _Ran:
    """The results of a call, and the method that computed them."""

    out: Tensor
    lse: Tensor | None
    standard_error: Tensor | None
    report: ToleranceReport | None
    method: AttentionMethod
    clamped: Tensor | None = None


def _attend(call: Call, method: AttentionMethod | Ladder | None, tolerance: float | None, wanted: _Wanted) -> _Ran:
    """Choose the method, and run it."""
    run_exactly = call.dense is not None or isinstance(_default(call) if method is None else method, Exact)
    if tolerance is not None or wanted.audit or not run_exactly:
        refuse_transforms("attention by a method, a tolerance or with an audit", call.query, call.key, call.value)
    with torch.autocast(autocast_device(call.query), enabled=False):
        if call.dense is not None:
            ran = _attend_dense(call, call.dense, Exact() if method is None else method, tolerance, wanted)
        elif tolerance is not None:
            ladder = method if isinstance(method, Ladder) else None
            out, lse, report = attend_within(call.problem(), tolerance, ladder, lse=wanted.lse)
            ran = _Ran(out, lse, None, report, ByHead(report.methods))
        else:
            named = method if isinstance(method, AttentionMethod) else _default(call)
            ran = _run(call, named, wanted)
    # exact attention returns rows as accumulated
    return replace(ran, out=ran.out.to(call.query.dtype))


def _default(call: Call) -> AttentionMethod:
    return default_method(call.key.shape[2], num_queries=call.query.shape[2], device=call.key.device)


def _run(call: Call, method: AttentionMethod, wanted: _Wanted) -> _Ran:
    """Run a method for the wanted results: the output alone is cheaper where heads are exact."""
    problem = call.problem(masked=method.follows_masks)
    if torch.compiler.is_compiling() and not isinstance(method, Exact) and is_opaque(method):
        result, error = attend_opaque(problem, method, wanted.lse, wanted.standard_error)
        rows, lse = (result.out, result.lse) if isinstance(result, Partial) else (result, None)
        return _Ran(rows, lse, error, None, method)
    if wanted.standard_error:
        partial, error = method.attend_with_error(problem)
        return _Ran(partial.out, partial.lse, error, None, method)
    if not wanted.lse:
        return _Ran(method.output(problem), None, None, None, method)
    partial, clamped = method.attend_counted(problem)
    return _Ran(partial.out, partial.lse, None, None, method, clamped)


def _attend_dense(
    call: Call, mask: Tensor, method: AttentionMethod | Ladder, tolerance: float | None, wanted: _Wanted
) -> _Ran:
    """Run exact attention under a dense mask, which no list of keys can express."""
    if not isinstance(method, Exact | Ladder) and call.key.shape[2]:
        raise NotImplementedError(
            f"{method!r} cannot follow a dense attn_mask of shape {tuple(mask.shape)}: lists are chosen by position. "
            "Use key_mask for padding, varlen_attention for packed sequences, or method=Exact()"
        )
    partial = exact_attention(call.query, call.key, call.value, scale=call.scale, attn_mask=mask, key_mask=call.live)
    error = torch.zeros_like(partial.lse) if wanted.standard_error else None
    report = None if tolerance is None else exact_report(call.query, call.key, tolerance)
    return _Ran(partial.out, partial.lse, error, report, Exact())


def _audit(call: Call, ran: _Ran, rows: int) -> ErrorReport:
    """Compare the returned output with exact rows."""
    report = judge(
        call.query,
        call.key,
        call.value,
        ran.out,
        rows=rows,
        is_causal=call.masking.is_causal,
        scale=call.scale,
        enable_gqa=True,
        key_mask=call.live,
        causal_align=call.masking.causal_align,
        seed=call.seed,
        method=ran.method,
    )
    return replace(report, num_clamped=ran.clamped)
