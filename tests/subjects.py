"""Everything that the package computes, as calls whose results must not depend on any global setting of torch."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import hyperattention as ha
from cases import CASES, CONTROL, Case
from hyperattention import policies
from hyperattention.cache.audited import AuditedStore
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.cache_report import report_on
from hyperattention.cache.compressing import CompressingStore
from hyperattention.cache.page_rank import Midpoint, TwoLevels
from hyperattention.cache.store import Store
from hyperattention.coreset import Coreset
from hyperattention.experimental.approx_row_sums import ApproxD
from hyperattention.kernels.feature.operator import feature_attention
from hyperattention.methods.base import AttentionMethod
from hyperattention.synthetic import gaussian, structured
from policies import POLICIES, PolicyCase
from problems import tensors
from tolerance_cases import LADDER, easy

ROOM, SCALE = CacheBudget(40, sinks=3, window=12), 0.3
# what a call gave, in an order of its own
Results = list[Tensor]
Call = Callable[[], Results]


def _tells_error(method: AttentionMethod) -> bool:
    """Return whether the method knows the standard error of its rows."""
    q, k, v = tensors(8)
    try:
        ha.measured_attention(q, k, v, method=method, standard_error=True)
    except (NotImplementedError, ValueError):
        return False
    return True


def _figures(report: ha.ErrorReport) -> Results:
    return [*report.interval, *(x for x in vars(report).values() if isinstance(x, Tensor))]


def _attention(case: Case) -> Call:
    q, k, v = tensors(case.num_tokens, batch=2, heads=4)
    live = torch.arange(case.num_tokens).expand(2, -1) >= torch.tensor([[0], [7]])
    told = _tells_error(case.method)

    def call() -> Results:
        results = []
        for causal in (True, False):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            result = ha.measured_attention(
                *leaves,
                is_causal=causal,
                enable_gqa=True,
                method=case.method,
                audit=16,
                key_mask=live if causal else None,
                standard_error=told,
                seed=3,
            )
            out, lse, error = result.out, result.lse, result.standard_error
            assert result.audit is not None
            gradients = torch.autograd.grad(out.square().sum() + lse[lse > -torch.inf].sum(), leaves)
            results += [out, lse, *([] if error is None else [error]), *_figures(result.audit), *gradients]
        return [x.detach() for x in results]

    return call


def _read(make: Callable[[], Store], sizes: tuple[int, ...] = (60, *[1] * 12, 20), padding: int = 0) -> Call:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, sum(sizes), 8, generator=generator) for heads in (4, 2, 2))
    live = torch.arange(sum(sizes)).expand(2, -1) >= torch.tensor([[0], [padding]])

    def call() -> Results:
        store, results = make(), []
        for size in sizes:
            part = slice(store.seen, store.seen + size)
            store.append(k[:, :, part], v[:, :, part])
            store.mask_padding(live[:, part])
            results.append(store.attend(q[:, :, part], SCALE).out)
            store.end_step(q[:, :, part], SCALE)
        other = make()
        other.restore(store.state())
        return results + list(store.state().values()) + list(other.state().values())

    return call


def _audited() -> Call:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 90, 8, generator=generator) for heads in (4, 2, 2))

    def call() -> Results:
        nothing, store = (AuditedStore(CompressingStore(policies.ClusterMeans(latest=4), ROOM), 2, 0) for _ in range(2))
        for at in (slice(0, 60), slice(60, 75), slice(75, 90)):
            store.append(k[:, :, at], v[:, :, at])
            store.mask_padding(torch.ones(2, at.stop - at.start, dtype=torch.bool, device="cpu"))
            store.attend(q[:, :, at], SCALE)
            store.end_step(q[:, :, at], SCALE)
        numbers = [x for x in vars(report_on({0: store}, 10)).values() if isinstance(x, float)]
        figures = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return [nothing.errors, store.errors, store.approximated, figures]

    return call


def _policy(case: PolicyCase) -> Call:
    return _read(lambda: CompressingStore(case.policy, ROOM, layer=2, seed=7), padding=5)


def _features() -> Call:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.rand(2, heads, 150, 5, generator=generator) for heads in (2, 1))
    v = torch.randn(2, 1, 150, 3, generator=generator)

    def call() -> Results:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        results = []
        for limit in (None, torch.arange(150, dtype=torch.int64, device="cpu")[None]):
            out, lse = feature_attention(*leaves, row_limit=limit)
            gradients = torch.autograd.grad(out.square().sum() + lse[lse > -torch.inf].sum(), leaves)
            results += [out.detach(), lse.detach(), *gradients]
        return results

    return call


def _packed() -> Call:
    q, k, v = tensors(170, heads=4)
    edges = torch.tensor([0, 20, 20, 170])
    pages = [x[0].unflatten(1, (-1, 10)).transpose(0, 1) for x in (k, v)]
    paged = (q[0].transpose(0, 1), *pages, torch.arange(17)[None], torch.tensor([0, 170]), torch.tensor([170]))

    def call() -> Results:
        results = []
        for method in (None, CONTROL):
            packed = ha.measured_varlen_attention(q, k, v, edges, is_causal=True, enable_gqa=True, method=method)
            in_pages = ha.measured_paged_attention(*paged, method=method)
            results += [packed.out, packed.lse, in_pages.out, in_pages.lse]
        return results

    return call


def _others() -> Iterator[tuple[str, Call]]:
    q, k, v = easy()
    yield "tolerance", lambda: _within(q, k, v)
    yield "structured inputs", lambda: _inputs(structured(700, heads=4, kv_heads=2, head_dim=16, seed=1))
    yield "gaussian inputs", lambda: _inputs(gaussian(300, heads=2, head_dim=8, seed=1))
    short = tensors(200, heads=4)
    yield "row sums", lambda: [ApproxD(16).log_row_sums(*short[:2], scale=SCALE)]
    yield "a coreset", lambda: list(vars(Coreset.of(*short[1:]).attend(short[0])).values())


def _within(q: Tensor, k: Tensor, v: Tensor) -> Results:
    result = ha.measured_attention(q, k, v, tolerance=0.2, is_causal=True, enable_gqa=True, method=LADDER)
    assert result.tolerance is not None
    out, report = result.out, result.tolerance
    return [out, report.bound, report.excess]


def _inputs(made: object) -> Results:
    return [x for x in vars(made).values() if isinstance(x, Tensor)]


def subjects() -> dict[str, Call]:
    """Name every call; inputs are made here, before any setting is changed."""
    subgen = policies.SubGen(delta=3.0, samples=2, value_samples=4, most_clusters=99)
    kept = {
        "pages": policies.TopPages(page=2, most_queries=4),
        "pages with draws": policies.TopPages(page=2, draws=8, most_queries=4),
        "pages by midpoints": policies.TopPages(by=Midpoint(), page=2, most_queries=4),
        "pages by two levels": policies.TopPages(by=TwoLevels(), page=2, most_queries=4),
        "look once": policies.LookOnce(pages=policies.TopPages(page=2, most_queries=4)),
        "subgen": subgen,
    }
    return {
        **{f"method: {case.name}": _attention(case) for case in CASES},
        **{f"policy: {case.name}": _policy(case) for case in POLICIES},
        **{
            f"cache: {name}": _read(lambda keeping=keeping: keeping.store(ROOM, 0, 0, None))
            for name, keeping in kept.items()
        },
        "audited cache": _audited(),
        "features": _features(),
        "packed sequences": _packed(),
        **dict(_others()),
    }
