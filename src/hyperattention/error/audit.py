"""The audit: exact attention on a few rows, compared with an output of any method."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.error.interval import mean_interval, percentile_bound
from hyperattention.error.judge import HeadErrors, judge, misses
from hyperattention.error.report import ErrorReport
from hyperattention.error.sampled_rows import SampledRows
from hyperattention.exact import visible_keys
from hyperattention.inputs import check_inputs, check_masks, check_tensors
from hyperattention.kernels.backend import triton_reads
from hyperattention.kernels.choose.operator_search import uniform_of_counters
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.method import Method
from hyperattention.random import hash_state, uniform
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window
from hyperattention.transforms import refuse_transforms, scale_of

__all__ = ["ErrorReport", "audit", "sample_rows"]

# first counter of the row draws, so that they share no random bits with the draws of a method under one seed
_STREAM = 0xA0D17
# sinks and window if the method is unknown
HEAVY = (16, 512)


def sample_rows(
    num_queries: int, rows: int, seed: int, device: torch.device | str, stream: tuple[int, ...] = (_STREAM,)
) -> Int[Tensor, " rows"]:
    """Draw one query from each of `rows` equal strata of the positions, or take all queries if there are at most `rows`.

    row_s = floor((s + u_s) * num_queries / rows), u_s uniform: the strata are equal intervals of real numbers, so every
    query is equally likely even if `rows` does not divide the number of queries.

    Args:
        num_queries: number of queries.
        rows: number of strata.
        seed: seed of the draws, which depend only on seed, stratum and stream.
        device: device of the indices.
        stream: first counters of the draws: each stream gives independent rows.

    Returns:
        indices in order.
    """
    if rows >= num_queries:
        return torch.arange(num_queries, dtype=torch.int64, device=device)
    stratum = torch.arange(rows, dtype=torch.int64, device=device)
    like = torch.empty(1, 1, dtype=torch.float32, device=device)
    if triton_reads(like):
        # one launch in place of some forty
        noise = uniform_of_counters(like, rows, int(hash_state((*stream, seed))))
    else:
        noise = uniform((*stream, seed, stratum), device)
    place = (stratum + noise) * (num_queries / rows)
    return place.long().clamp(max=num_queries - 1)


@torch.no_grad()
def audit(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    out: Float[Tensor, "batch heads queries value_dim"],
    *,
    rows: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    causal_align: str = "upper_left",
    seed: int = 0,
    method: AttentionMethod | None = None,
    heavy: tuple[int, int] | None = None,
    hardness: bool = True,
) -> ErrorReport:
    """Measure the error of an attention output, on exact rows drawn one from each of equal strata of the positions.

    All batch entries and heads share the rows, so that keys are read once. Each head's interval is valid by itself; the
    heads' errors are not independent. If `rows` is at least the number of queries, every row is measured, and the interval
    is a point. A row that sees no key is not measured, but counted in `num_empty`. Invalid input raises the errors of
    `check_audit` and `attention`.
    Cost: O(rows * keys * head_dim) per head, O(rows * keys) memory for one head at a time.   Guarantee: see `mean_interval`,
    `percentile_bound` and `row_statistics` for the estimate and the direction of the bias of each figure.

    Args:
        query: queries.
        key: keys.
        value: values.
        out: the output to measure, of any method and dtype.
        rows: number of rows to draw per head.
        is_causal: whether `out` should be causal attention.
        scale: factor on the scores; 1 / sqrt(head_dim) if None.
        enable_gqa: whether query heads may share kv heads.
        key_mask: True = attend.
        causal_align: "upper_left" or "lower_right".
        seed: seed of the rows drawn.
        method: the method that computed `out`, if known: it gives the share of pairs and the heavy mask.
        heavy: sinks and window (in keys) left out of kappa; if None those of the method, or 16 and 512.
        hardness: whether alpha, kappa and the error in the paper's norm are wanted. If False they are NaN, and a GPU reads
            every key once.

    Returns:
        the report.
    """
    check_tensors(query=query, key=key, value=value, out=out)
    check_inputs(query, key, value, enable_gqa=enable_gqa, dropout_p=0.0, seed=seed, check_finite=False)
    check_masks(query, key, None, key_mask, is_causal=is_causal, causal_align=causal_align)
    check_audit(query, key, value, out, rows)
    refuse_transforms("an audit", query, key, value, out)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if hardness:
        heavy = _heavy_mask(method) if heavy is None else heavy
        sample = sample_for(
            query, key, rows, is_causal=is_causal, causal_align=causal_align, scale=scale, heavy=heavy, seed=seed
        )
        found = judge(query, key, value, out, key_mask, sample)
    else:
        index = sample_rows(num_queries, rows, seed, query.device)
        # of these rows alone: see `visible_keys`
        shift = 1 + (num_keys - num_queries if causal_align == "lower_right" else 0)
        seen = (index + shift).clamp(0, num_keys) if is_causal else index.new_full(index.shape, num_keys)
        factor = scale_of(scale, query.shape[-1])
        found = misses(query, key, value, out, key_mask, index, seen, factor)
    share = None
    if method is not None and num_queries == num_keys:
        share = method.cost(num_keys, is_causal=is_causal, head_dim=query.shape[-1]).share_of_exact
    return report_on(found, num_queries, share)


def sample_for(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    rows: int,
    *,
    is_causal: bool,
    causal_align: str = "upper_left",
    scale: float | None = None,
    heavy: tuple[int, int] = HEAVY,
    seed: int = 0,
) -> SampledRows:
    """Draw the rows of an audit, with the keys that each may see.

    Args:
        query: queries.
        key: keys.
        rows: number of rows to draw per head.
        is_causal: whether the outputs to measure are causal.
        causal_align: "upper_left" or "lower_right".
        scale: factor on the scores; 1 / sqrt(head_dim) if None.
        heavy: sinks and window (in keys) left out of kappa.
        seed: seed of the rows drawn.

    Returns:
        the sample.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    index = sample_rows(num_queries, rows, seed, query.device)
    visible = visible_keys(num_queries, num_keys, is_causal, causal_align, query.device)
    shift = num_keys - num_queries if causal_align == "lower_right" else 0
    sinks, window = heavy
    return SampledRows(
        index=index,
        visible=[num_keys] * len(index) if visible is None else visible[0, index].tolist(),
        num_queries=num_queries,
        scale=scale_of(scale, query.shape[-1]),
        sinks=sinks,
        windows=_windows([int(row) + shift for row in index], window, num_keys, is_causal),
    )


def report_on(found: HeadErrors, num_queries: int, share_of_pairs: float | None) -> ErrorReport:
    """Summarise the errors of the sampled rows, with intervals for all rows.

    Args:
        found: errors of the sampled rows.
        num_queries: number of all rows.
        share_of_pairs: pairs that the method lists relative to exact attention's, if known.

    Returns:
        the report.
    """
    num_rows = found.errors.shape[-1]
    mean = found.errors.masked_fill(~found.live[:, None], 0.0).sum(-1) / found.live.sum(-1, keepdim=True)
    if num_rows < num_queries:
        interval, bound = mean_interval(found.errors, found.live), percentile_bound(found.errors, found.live)
    else:
        interval, bound = (mean, mean), _percentile(found.errors, found.live)
    return ErrorReport(
        relative_error=mean,
        interval=interval,
        percentile_95_bound=bound,
        operator_error=found.operator_error,
        alpha=found.alpha,
        kappa=found.kappa,
        share_of_pairs=share_of_pairs,
        num_rows=num_rows,
        num_empty=(~found.live).sum(-1),
    )


def check_audit(query: Tensor, key: Tensor, value: Tensor, out: Tensor, rows: int) -> None:
    """Check the arguments of an audit, beyond the checks of attention itself.

    Args:
        query: queries.
        key: keys.
        value: values.
        out: the output to measure.
        rows: number of rows to draw.

    Raises:
        ValueError: if `out` does not have the shape of attention's output, `rows` is not positive, or a length is 0.
    """
    wanted = (*query.shape[:-1], value.shape[-1])
    if tuple(out.shape) != wanted:
        raise ValueError(
            f"out has shape {tuple(out.shape)}, but attention of these inputs gives {wanted}; transpose or cut it"
        )
    if out.device != query.device:
        raise ValueError(f"out is on {out.device} and query on {query.device}: move them to one device")
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"{rows!r} rows to audit: give a positive integer; 59 rows or more also bound the 95th percentile")
    if not out.shape[2] or not key.shape[2]:
        raise ValueError(
            f"{out.shape[2]} queries and {key.shape[2]} keys: an audit needs at least one of each; leave the audit out"
        )


def _heavy_mask(method: AttentionMethod | None) -> tuple[int, int]:
    stages = method.stages if isinstance(method, Method) else ()
    sinks = sum(stage.num for stage in stages if isinstance(stage, Sinks))
    window = sum(stage.size for stage in stages if isinstance(stage, Window))
    return (sinks, window) if sinks or window else HEAVY


def _windows(positions: list[int], size: int, num_keys: int, is_causal: bool) -> list[tuple[int, int]]:
    """Place each row's window: the last keys it may see, or the keys on both sides of it."""
    if is_causal:
        # a causal row has no weight beyond its window, so no sum is needed there
        return [(min(position + 1, num_keys) - size, num_keys) for position in positions]
    return [(position - size // 2, max(0, position + size - size // 2)) for position in positions]


def _percentile(errors: Tensor, live: Tensor) -> Tensor:
    """Find the 95th percentile of a fully observed population."""
    ordered = errors.masked_fill(~live[:, None], torch.inf).sort(-1).values
    counted = live.sum(-1)
    place = ((0.95 * counted).ceil().long() - 1).clamp(min=0)[:, None, None].expand(-1, errors.shape[1], 1)
    return ordered.gather(-1, place).squeeze(-1).masked_fill(counted[:, None] == 0, torch.nan)
