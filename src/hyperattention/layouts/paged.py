"""Attention over keys and values in pages, as serving engines store them: requests of unequal lengths in one call."""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.error.audit import audit as judge
from hyperattention.error.report import ErrorReport
from hyperattention.error.tolerance.ladder import Ladder, check_tolerance
from hyperattention.error.tolerance.report import ToleranceReport
from hyperattention.error.tolerance.within import attend_within
from hyperattention.inputs import autocast_device
from hyperattention.layouts.ragged import Packed, ragged_attention
from hyperattention.layouts.requests import Requests, checked_requests
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.by_layer import ByLayer
from hyperattention.methods.default import default_method
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.problem import Problem
from hyperattention.result import SequencesResult


def paged_attention(
    query: Float[Tensor, "tokens heads head_dim"],
    key_pages: Float[Tensor, "pages kv_heads page_size head_dim"],
    value_pages: Float[Tensor, "pages kv_heads page_size value_dim"],
    block_table: Int[Tensor, "sequences pages_each"],
    query_start_loc: Int[Tensor, " sequences_plus_one"],
    seq_lens: Int[Tensor, " sequences"],
    *,
    scale: float | None = None,
    method: AttentionMethod | Ladder | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    layer: int = 0,
    first_kv_head: int = 0,
) -> Float[Tensor, "tokens heads value_dim"]:
    """Compute causal attention for several requests whose keys, including those of this step, are already in their pages.

    The queries of request s are its last ones: decoding has one query, a chunk of a prompt several. Requests with exact
    attention share one launch, which reads the pages directly. For other requests the method chooses keys, and the same
    kernel reads them from the pages; keys are copied out of the pages only if the method's choice reads keys, or for a
    tolerance. Inference only: pages have no gradient. Arguments that do not fit raise ValueError or TypeError; the message
    names the remedy.

    Args:
        query: queries of all requests, end to end.
        key_pages: the cache of keys, of any strides.
        value_pages: the cache of values.
        block_table: the pages of each request, in order; entries after its last page are ignored.
        query_start_loc: where each request's queries begin, and where the last ends; if on a GPU, the host waits for it.
        seq_lens: number of keys of each request, including those of its queries; if on a GPU, the host waits for it.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.
        method: the method for each request; None decides by the length of the request. Methods by head or by layer copy
            the keys and values of a request out of its pages. Other methods that are neither exact nor a list of stages
            raise NotImplementedError.
        tolerance: mean relative row error allowed for each head of each request, in (0, 1).
        seed: seed of every draw.
        layer: layer of the model.
        first_kv_head: number of the first kv head among those of the model, where a process holds only some of them
            (tensor parallelism); the draws of a head depend on its number.

    Returns:
        the outputs, end to end.
    """
    check_tolerance(tolerance, method)
    requests = checked_requests(
        query, key_pages, value_pages, block_table, query_start_loc, seq_lens, scale, seed, layer, first_kv_head
    )  # fmt: skip
    return _attend(requests, method, tolerance, standard_error=False)[0].out


def measured_paged_attention(
    query: Float[Tensor, "tokens heads head_dim"],
    key_pages: Float[Tensor, "pages kv_heads page_size head_dim"],
    value_pages: Float[Tensor, "pages kv_heads page_size value_dim"],
    block_table: Int[Tensor, "sequences pages_each"],
    query_start_loc: Int[Tensor, " sequences_plus_one"],
    seq_lens: Int[Tensor, " sequences"],
    *,
    scale: float | None = None,
    method: AttentionMethod | Ladder | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    layer: int = 0,
    first_kv_head: int = 0,
    standard_error: bool = False,
    audit: int | None = None,
) -> SequencesResult:
    """Compute attention as `paged_attention` does; return the log-sum-exp and the reports asked for, one per request.

    Each request is measured separately. An audit copies a request's keys and values out of their pages.

    Args:
        query: queries. This and the next eleven arguments are as for `paged_attention`.
        key_pages: the cache of keys.
        value_pages: the cache of values.
        block_table: the pages of each request.
        query_start_loc: where each request's queries begin.
        seq_lens: keys of each request.
        scale: factor of the scores.
        method: the method for each request.
        tolerance: mean relative row error allowed for each head of each request.
        seed: seed of every draw.
        layer: layer of the model.
        first_kv_head: number of the first kv head.
        standard_error: whether to estimate the standard error of every row.
        audit: rows of each request to check against exact attention; None for no audit.

    Returns:
        out ``[tokens, heads, value_dim]``, lse and standard errors ``[tokens, heads]``, and one report per request.
    """
    check_tolerance(tolerance, method, standard_error)
    requests = checked_requests(
        query, key_pages, value_pages, block_table, query_start_loc, seq_lens, scale, seed, layer, first_kv_head
    )  # fmt: skip
    result, runs = _attend(requests, method, tolerance, standard_error=standard_error)
    if audit is None:
        return result
    reports = tuple(_audit(requests, s, result.out, run, audit) for s, run in enumerate(runs))
    return SequencesResult(result.out, result.lse, result.standard_error, reports, result.tolerance)


@torch.no_grad()
def _attend(
    requests: Requests, method: AttentionMethod | Ladder | None, tolerance: float | None, *, standard_error: bool
) -> tuple[SequencesResult, list[AttentionMethod]]:
    """Compute every request: those with key lists one by one, the exact ones together."""
    query, starts = requests.query, requests.starts
    out = query.new_zeros((*query.shape[:2], requests.pages.value.shape[3]))
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    error = torch.zeros_like(lse) if standard_error else None
    runs: list[AttentionMethod] = []
    reports: list[ToleranceReport] = []
    with torch.autocast(autocast_device(query), enabled=False):
        for s, (begin, end) in enumerate(pairwise(starts)):
            if tolerance is not None:
                problem = requests.problem(s, keys=True, values=True, in_pages=False)
                ladder = method if isinstance(method, Ladder) else None
                rows, own_lse, report = attend_within(problem, tolerance, ladder, lse=True)
                assert own_lse is not None  # asked for
                out[begin:end], lse[begin:end] = rows[0].transpose(0, 1), own_lse[0].transpose(0, 1)
                reports.append(report)
                runs.append(ByHead(report.methods))
                continue
            run = _method_of(requests, s, method)
            runs.append(run)
            if not isinstance(run, Exact):
                problem = _problem_of(requests, s, run)
                part, own = run.attend_with_error(problem) if error is not None else (run.attend(problem), None)
                out[begin:end], lse[begin:end] = part.out[0].transpose(0, 1), part.lse[0].transpose(0, 1)
                if error is not None and own is not None:
                    error[begin:end] = own[0].transpose(0, 1)
        exact = [s for s, run in enumerate(runs) if isinstance(run, Exact)]
        if exact:
            _attend_exactly(requests, exact, out, lse)
    return SequencesResult(out, lse, error, (), tuple(reports)), runs


def _method_of(requests: Requests, number: int, method: AttentionMethod | Ladder | None) -> AttentionMethod:
    """Return the method of a request."""
    if isinstance(method, ByLayer):
        method = method.of(requests.layer)
    if isinstance(method, Exact | Method | ByHead):
        return method
    if method is None:
        count, device = len(requests.queries(number)), requests.query.device
        return default_method(requests.lengths[number], num_queries=count, device=device)
    raise NotImplementedError(f"{method!r} does not read pages: use Exact(), a Method of stages, or these by head or layer")


def _problem_of(requests: Requests, number: int, run: AttentionMethod) -> Problem:
    """Leave keys in their pages for a list of stages, and copy them for methods by head, which split them."""
    if isinstance(run, Method):
        return requests.problem(number, keys=run.reads_keys, values=run.reads_values, in_pages=True)
    return requests.problem(number, keys=True, values=True, in_pages=False)


def _attend_exactly(requests: Requests, exact: list[int], out: Tensor, lse: Tensor) -> None:
    """Compute some requests in one launch, and write the results to their rows."""
    starts = requests.starts
    count, keys = [starts[s + 1] - starts[s] for s in exact], [requests.lengths[s] for s in exact]
    offset = [k - c for k, c in zip(keys, count, strict=True)]
    packed = Packed([starts[s] for s in exact], count, keys, offset, causal=True)
    pages = requests.pages
    parts = ragged_attention(
        requests.query, pages.key, pages.value, packed, requests.scale, table=pages.table[exact],
        kv_heads=pages.key.shape[1],
    )  # fmt: skip
    rows = torch.cat([torch.arange(starts[s], starts[s + 1], dtype=torch.int64, device=out.device) for s in exact])
    out.index_copy_(0, rows, parts[0])
    lse.index_copy_(0, rows, parts[1])


def _audit(requests: Requests, number: int, out: Tensor, run: AttentionMethod, rows: int) -> ErrorReport | None:
    """Measure the error of a request's output on exact rows; None if it has no queries."""
    problem = requests.problem(number, keys=True, values=True, in_pages=False)
    if not problem.num_queries or not problem.num_keys:
        return None
    own = out[requests.starts[number] : requests.starts[number + 1]].transpose(0, 1)[None]
    return judge(
        problem.q, problem.k, problem.v, own, rows=rows, is_causal=True, scale=requests.scale, enable_gqa=True,
        causal_align="lower_right", seed=requests.seed, method=run,
    )  # fmt: skip
