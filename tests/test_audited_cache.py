"""The audit of a cache: what it reports is the error there was, of tokens drawn whatever they say, and changes nothing."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from assertions import assert_exact
from hyperattention.cache import audited
from hyperattention.cache.audited import AuditedStore
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.cache_report import report_on
from hyperattention.cache.compressing import CompressingStore
from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.error.exact_rows import exact_rows
from hyperattention.policies.latest import Latest
from hyperattention.policies.top_pages import TopPages
from hyperattention.policies.uniform_sample import UniformSample
from hyperattention.types import Partial

HEADS, KV_HEADS, WIDTH, SCALE = 4, 2, 8, 8**-0.5
ROOM = CacheBudget(24, 2, 8)


def inputs(tokens: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, WIDTH, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    # values that agree somewhat, or exact rows are nearly 0 and every relative error is large
    return q, k, v + 2


def step(store: AuditedStore, q: Tensor, k: Tensor, v: Tensor, at: slice) -> Tensor:
    store.append(k[:, :, at], v[:, :, at])
    out = store.attend(q[:, :, at], SCALE).out
    store.end_step(q[:, :, at], SCALE)
    return out


def run(store: AuditedStore, q: Tensor, k: Tensor, v: Tensor, prompt: int = 40) -> Tensor:
    """Read a prompt whole, then token by token; the outputs of the latter."""
    store.append(k[:, :, :prompt], v[:, :, :prompt])
    store.end_step(q[:, :, :prompt], SCALE)
    return torch.cat([step(store, q, k, v, slice(at, at + 1)) for at in range(prompt, q.shape[2])], 2)


def truth_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)


def test_the_report_is_the_error_there_was() -> None:
    q, k, v = inputs(140)
    store = AuditedStore(CompressingStore(UniformSample(), ROOM), 4, 0)
    out, truth = run(store, q, k, v), truth_of(q, k, v)[:, :, 40:]
    error = ((out - truth).norm(dim=-1) / truth.norm(dim=-1))[0]
    assert int(store.approximated.sum()) == 100
    assert len(store.audited) == 25
    assert_exact(store.errors, error[:, [at - 40 for at in store.audited]], size=1.0)
    report = report_on({3: store}, 140 * 2 * KV_HEADS * WIDTH * 4)
    assert report.relative_error == pytest.approx(float(store.errors.mean()))
    assert report.interval[0] < report.relative_error < report.interval[1]
    assert f"relative error {report.relative_error:.2g} (95% CI" in str(report)
    assert (report.memory_bytes, report.whole_bytes) == (store.memory_bytes, 140 * 2 * KV_HEADS * WIDTH * 4)
    assert report.num_read == store.num_slots <= 24
    share = f"{report.num_read / 140:.1%} of 140 keys read a step"
    assert f"{report.memory_bytes / report.whole_bytes:.1%} of 0.0171 MiB held, {share}" in str(report)
    assert "25 of 100 approximated tokens audited; worst: layer 3" in str(report)


def test_too_few_audited_tokens_are_reported_without_an_interval() -> None:
    store = AuditedStore(CompressingStore(UniformSample(), ROOM), 10, 0)
    run(store, *inputs(140))
    report = report_on({0: store}, 10**6)
    mean = f"relative error {report.relative_error:.2g}"
    assert str(report).startswith(
        f"{mean}, 10 of 100 approximated tokens audited (too few for an interval: at least 16); worst: layer 0, "
    )
    assert "95% CI" not in str(report)


def test_where_every_token_is_audited_nothing_is_left_to_chance() -> None:
    store = AuditedStore(CompressingStore(Latest(), ROOM), 1, 0)
    run(store, *inputs(90))
    report = report_on({0: store}, 10**6)
    assert report.num_audited == report.num_approximated == 50
    assert report.interval == (report.relative_error, report.relative_error)


class Wrong(CompressingStore):
    """A planted fault: the wrong sign."""

    def attend(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> Partial:
        part = super().attend(q, scale, rule)
        return Partial(-part.out, part.lse)


def test_a_store_that_is_wrong_is_found_out() -> None:
    errors = []
    for kind in (CompressingStore, Wrong):
        store = AuditedStore(kind(UniformSample(), CacheBudget(60, 2, 30)), 2, 0)
        run(store, *inputs(200), prompt=70)
        errors.append(report_on({0: store}, 10**6).relative_error)
    assert errors[0] < 0.5 < 1.5 < errors[1]


def test_what_is_given_is_not_changed_and_what_is_drawn_does_not_depend_on_it() -> None:
    bare, places = CompressingStore(UniformSample(), ROOM), []
    for seed in (0, 1):
        q, k, v = inputs(200, seed=seed)
        watched = AuditedStore(CompressingStore(UniformSample(), ROOM), 8, 5)
        ours = run(watched, q, k, v)
        bare = CompressingStore(UniformSample(), ROOM)
        bare.append(k[:, :, :40], v[:, :, :40])
        bare.end_step(q[:, :, :40], SCALE)
        for at in range(40, 200):
            bare.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
            assert torch.equal(bare.attend(q[:, :, at : at + 1], SCALE).out, ours[:, :, at - 40 : at - 39])
            bare.end_step(q[:, :, at : at + 1], SCALE)
        assert watched.memory_bytes == bare.memory_bytes
        assert watched.shadow_bytes > bare.memory_bytes
        places.append(watched.audited)
    assert places[0] == places[1]
    assert [at // 8 for at in places[0]] == list(range(5, 25))  # one in each run
    assert len({at % 8 for at in places[0]}) > 4
    other = AuditedStore(CompressingStore(UniformSample(), ROOM), 8, 6)
    run(other, *inputs(200))
    assert other.audited != places[0]


def test_exact_steps_count_for_nothing() -> None:
    store = AuditedStore(CompressingStore(UniformSample(), CacheBudget(500, 2, 8)), 1, 0)
    run(store, *inputs(90))
    report = report_on({0: store}, 10**6)
    assert (report.num_approximated, report.num_audited, report.num_tokens) == (0, 0, 90)
    assert str(report) == "nothing to measure: the cache read every key for all 90 tokens"
    rarely = AuditedStore(CompressingStore(UniformSample(), ROOM), 10_000, 0)
    run(rarely, *inputs(60))
    assert "not measured: none of 20 approximated tokens was drawn" in str(report_on({0: rarely}, 10**6))


def test_steps_of_several_tokens_are_judged_token_by_token() -> None:
    q, k, v = inputs(140)
    store = AuditedStore(TopPages(page=2).store(ROOM, 0, 0, None), 4, 0)
    store.append(k[:, :, :40], v[:, :, :40])
    store.end_step(q[:, :, :40], SCALE)
    outs = [step(store, q, k, v, slice(at, at + 5)) for at in range(40, 140, 5)]
    truth = truth_of(q, k, v)[:, :, 40:]
    error = ((torch.cat(outs, 2) - truth).norm(dim=-1) / truth.norm(dim=-1))[0]
    assert len(store.audited) == 25
    assert_exact(store.errors, error[:, [at - 40 for at in store.audited]], size=1.0)
    assert store.errors.max() > 0.01


def test_of_a_chunk_only_the_rows_drawn_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def counting(q: Tensor, *rest: object) -> Tensor:
        rows.append(q.shape[2])
        return exact_rows(q, *rest)

    monkeypatch.setattr(audited, "exact_rows", counting)
    store = AuditedStore(CompressingStore(UniformSample(), ROOM), 10, 0)
    q, k, v = inputs(240)
    store.append(k[:, :, :40], v[:, :, :40])
    store.end_step(q[:, :, :40], SCALE)
    for at in range(40, 240, 50):
        step(store, q, k, v, slice(at, at + 50))
    assert sum(rows) == len(store.audited) == 20
    assert int(store.approximated.sum()) == 200


def test_narrow_numbers_are_judged_by_exact_rows_that_are_not_narrow() -> None:
    q, k, v = (x.bfloat16() for x in inputs(60))
    store = AuditedStore(CompressingStore(UniformSample(), ROOM), 1, 0)
    out, truth = run(store, q, k, v), truth_of(q, k, v)[:, :, 40:]
    error = ((out - truth).norm(dim=-1) / truth.norm(dim=-1))[0]
    assert_exact(store.errors, error, size=1.0)


def test_padding_is_not_judged() -> None:
    q, k, v = inputs(120, batch=2)
    store = AuditedStore(CompressingStore(UniformSample(), ROOM), 1, 0)
    live = torch.ones(2, 40, dtype=torch.bool)
    live[1, :25] = False
    store.append(k[:, :, :40], v[:, :, :40])
    store.mask_padding(live)
    store.end_step(q[:, :, :40], SCALE)
    outs = torch.cat([step(store, q, k, v, slice(at, at + 1)) for at in range(40, 120)], 2)
    truth = torch.cat([truth_of(q[:1], k[:1], v[:1])[:, :, 40:], truth_of(*(x[1:, :, 25:] for x in (q, k, v)))[:, :, 15:]])
    error = ((outs - truth).norm(dim=-1) / truth.norm(dim=-1)).mean(0)
    assert_exact(store.errors, error, size=1.0)


def test_padding_among_tokens_that_are_approximated_is_not_judged_either() -> None:
    q, k, v = inputs(100, batch=2)
    live = torch.ones(2, 100, dtype=torch.bool)
    live[1, 50:70], live[0, 60:65] = False, False
    store = AuditedStore(CompressingStore(UniformSample(), ROOM), 1, 0)
    store.append(k[:, :, :40], v[:, :, :40])
    store.end_step(q[:, :, :40], SCALE)
    outs = []
    for at in range(40, 100, 5):
        store.append(k[:, :, at : at + 5], v[:, :, at : at + 5])
        store.mask_padding(live[:, at : at + 5])
        outs.append(store.attend(q[:, :, at : at + 5], SCALE).out)
        store.end_step(q[:, :, at : at + 5], SCALE)
    seen = live[:, None, None] & torch.ones(100, 100, dtype=torch.bool).tril()
    truth = scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=seen, enable_gqa=True)[:, :, 40:]
    error = ((torch.cat(outs, 2) - truth).norm(dim=-1) / truth.norm(dim=-1)).transpose(1, 2)  # [batch, tokens, heads]
    expected = [error[live[:, at], at - 40].mean(0) for at in range(40, 100) if bool(live[:, at].any())]
    assert store.audited == (*range(40, 60), *range(65, 100))
    assert_exact(store.errors, torch.stack(expected, 1), size=1.0)


def test_beams_and_crops_take_the_witness_along() -> None:
    q, k, v = inputs(140, batch=2)
    store = AuditedStore(CompressingStore(UniformSample(), ROOM), 2, 0)
    run(store, q, k, v)
    before, errors = store.audited, store.errors
    store.take_rows(torch.tensor([1, 1, 0]))
    store.crop(3)
    assert store.audited == tuple(at for at in before if at < 137)
    assert int(store.approximated.sum()) == 97
    assert_exact(store.errors, errors[:, : len(store.audited)], size=1.0)
    rows = torch.tensor([1, 1, 0])
    # other tokens than those that were forgotten
    others = inputs(3, batch=3, seed=1)
    q, k, v = (torch.cat([x[rows, :, :137], other], 2) for x, other in zip((q, k, v), others, strict=True))
    out = torch.cat([step(store, q, k, v, slice(at, at + 1)) for at in range(137, 140)], 2)
    assert store.audited == before
    truth = truth_of(q, k, v)[:, :, 137:]
    error = ((out - truth).norm(dim=-1) / truth.norm(dim=-1)).mean(0)
    new = [at - 137 for at in before if at >= 137]
    assert_exact(store.errors[:, -len(new) :], error[:, new], size=1.0)


def test_an_audit_cannot_begin_halfway() -> None:
    store = AuditedStore(CompressingStore(Latest(), ROOM), 4, 0)
    run(store, *inputs(60))
    with pytest.raises(ValueError, match="every key from the first token on"):
        AuditedStore(CompressingStore(Latest(), ROOM), 4, 0).restore(store.state())
    CompressingStore(Latest(), ROOM).restore(store.state())
    with pytest.raises(ValueError, match=r"every=0"):
        AuditedStore(CompressingStore(Latest(), ROOM), 0, 0)
