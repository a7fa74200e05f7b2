"""The audit: its figures mean what they say, and it judges any output."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import hyperattention as ha
from assertions import assert_exact, assert_same_bits
from hyperattention.error.audit import audit, check_audit, sample_rows
from hyperattention.error.row_statistics import light_weight
from hyperattention.error.sampled_rows import hide_later
from hyperattention.exact import exact_attention, visible_keys
from hyperattention.inputs import check_tensors
from problems import tensors


def cover(low, high, truth):
    return ((low <= truth) & (truth <= high)).double().mean().item()


@pytest.mark.parametrize(("queries", "rows"), [(100, 64), (1000, 64), (65, 64)])
def test_every_row_is_as_likely_as_any_other(queries, rows):
    draws = 500
    drawn = torch.stack([sample_rows(queries, rows, seed, "cpu") for seed in range(draws)])
    assert drawn.shape == (draws, rows)
    assert (drawn.diff(dim=-1) >= 0).all()
    expected = draws * rows / queries
    # binomial at most: strata only lower the variance
    assert ((drawn.flatten().bincount(minlength=queries) - expected).abs() <= 4.5 * math.sqrt(expected)).all()


def problem(heads=2, kv_heads=1, queries=300, keys=300, *, batch=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, queries, 16), (batch, kv_heads, keys, 16), (batch, kv_heads, keys, 12)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return 3 * q, k, v


def exact(q, k, v, *, is_causal=True, align="upper_left", key_mask=None):
    visible = visible_keys(q.shape[2], k.shape[2], is_causal, align, "cpu")
    return exact_attention(q, k, v, scale=q.shape[-1] ** -0.5, visible=visible, key_mask=key_mask).out.to(q.dtype)


def corrupted(out):
    """Small errors everywhere, and one row in thirty wholly wrong."""
    generator = torch.Generator().manual_seed(5)
    wrong = torch.rand(out.shape[2], generator=generator) < 1 / 30
    noise = torch.randn(out.shape, generator=generator) * out.norm(dim=-1, keepdim=True) / math.sqrt(out.shape[-1])
    return torch.where(wrong[:, None], torch.zeros_like(out), out + 0.05 * noise)


def row_errors(out, truth):
    return (out - truth).norm(dim=-1) / truth.norm(dim=-1)


@pytest.mark.parametrize(
    ("is_causal", "align", "queries"), [(True, "upper_left", 300), (False, "upper_left", 200), (True, "lower_right", 200)]
)
def test_all_rows_give_the_truth_and_a_point(is_causal, align, queries):
    q, k, v = problem(queries=queries)
    truth = exact(q, k, v, is_causal=is_causal, align=align)
    out = corrupted(truth)
    report = audit(q, k, v, out, rows=1000, is_causal=is_causal, causal_align=align, enable_gqa=True)
    errors = row_errors(out, truth)
    assert_exact(report.relative_error, errors.mean(-1))
    assert_exact(report.percentile_95_bound, errors.kthvalue(math.ceil(0.95 * queries), dim=-1).values)
    assert_same_bits(report.interval[0], report.interval[1])
    assert report.num_rows == queries


def test_many_rows_that_see_nothing_are_counted_and_not_judged():
    q, k, v = problem(queries=300, keys=200)
    truth = exact(q, k, v, is_causal=True, align="lower_right")
    for rows in (64, 1000):
        report = audit(q, k, v, truth, rows=rows, is_causal=True, causal_align="lower_right", enable_gqa=True)
        assert report.relative_error.max() < 1e-5


def test_intervals_of_corrupted_outputs_cover_the_truth():
    q, k, v = problem(heads=2, kv_heads=1, queries=400, keys=400, batch=1)
    truth = exact(q, k, v)
    out = corrupted(truth)
    mean = row_errors(out, truth).mean(-1)
    reports = [audit(q, k, v, out, is_causal=True, enable_gqa=True, seed=seed) for seed in range(100)]
    low, high = (torch.stack([report.interval[end] for report in reports]) for end in (0, 1))
    # 100 seeds: a standard error of 0.022 at 0.95
    assert cover(low, high, mean) >= 0.90
    measured = torch.stack([report.relative_error for report in reports])
    assert ((measured.mean(0) - mean).abs() <= 4.5 * measured.std(0) / 10).all()
    assert measured.std(0).min() > 0


def test_exact_output_has_no_error_and_other_arguments_do():
    q, k, v = problem()
    sdpa = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    fine = audit(q, k, v, sdpa, is_causal=True, enable_gqa=True)
    assert (fine.relative_error < 100 * torch.finfo(torch.float32).eps).all()
    # each argument is read: judged by another one, the same output is wrong
    others = [
        {"is_causal": False},
        {"is_causal": True, "scale": 0.5},
        {"is_causal": True, "key_mask": torch.arange(300) > torch.tensor([[9], [9]])},
    ]
    for other in others:
        assert (audit(q, k, v, sdpa, enable_gqa=True, **other).relative_error > 0.1).all()


def test_padding_is_left_out_and_counted():
    q, k, v = problem(batch=1)
    pad = 100
    padded = [torch.nn.functional.pad(x, (0, 0, pad, 0), value=7.0) for x in (q, k, v)]
    padded[2][:, :, :pad] = torch.nan
    key_mask = (torch.arange(400) >= pad)[None]
    out = corrupted(exact(q, k, v))
    plain = audit(q, k, v, out, rows=400, is_causal=True, enable_gqa=True, heavy=(16, 64))
    report = audit(
        *padded,
        torch.nn.functional.pad(out, (0, 0, pad, 0)),
        rows=400,
        is_causal=True,
        enable_gqa=True,
        key_mask=key_mask,
        heavy=(16, 64),
    )
    assert report.num_empty.tolist() == [pad]
    assert_exact(report.relative_error, plain.relative_error)
    assert_exact(report.percentile_95_bound, plain.percentile_95_bound)
    assert_exact(report.kappa, plain.kappa)
    nothing = audit(*padded, padded[0][..., :12], is_causal=True, enable_gqa=True, key_mask=key_mask & False)
    assert nothing.relative_error.isnan().all()
    assert nothing.num_empty.tolist() == [64]


@pytest.mark.parametrize("limit", [1, 4 * 64 * 300 * 2])
def test_heads_do_not_mix_whatever_the_chunks(limit, monkeypatch):
    q, k, v = problem(heads=6, kv_heads=3)
    out = corrupted(exact(q, k, v))
    whole = audit(q, k, v, out, is_causal=True, enable_gqa=True)
    monkeypatch.setattr("hyperattention.error.sampled_rows._CHUNK_BYTES", limit)
    alone = audit(q, k, v, out, is_causal=True, enable_gqa=True)
    repeated = audit(q, *(x.repeat_interleave(2, 1) for x in (k, v)), out, is_causal=True)
    names = ("relative_error", "operator_error", "alpha", "kappa", "percentile_95_bound")
    for other in (alone, repeated):
        for name in names:
            assert_exact(getattr(other, name), getattr(whole, name))
    single = audit(q[1:, 2:3], k[1:, 1:2], v[1:, 1:2], out[1:, 2:3], is_causal=True)
    for name in names:
        assert_exact(getattr(single, name), getattr(whole, name)[1:, 2:3])


def softmax_matrix(q, k):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1), scores


def test_hardness_of_all_rows_is_that_of_the_matrix():
    q, k, v = problem(heads=2, kv_heads=2, dtype=torch.float64)
    weights, scores = softmax_matrix(q, k)
    truth = weights @ v
    out = corrupted(truth)
    report = audit(q, k, v, out, rows=300, is_causal=True, heavy=(4, 32))
    assert_exact(report.alpha, 300 * weights.square().sum(-2).amax(-1))
    place = torch.arange(300)
    light = (place >= 4) & (place <= place[:, None] - 32)
    sums = scores.masked_fill(~light, -torch.inf).logsumexp(-1)[..., 36:]
    assert_exact(report.kappa, (sums.amax(-1) - sums.amin(-1)).exp())
    norm = torch.linalg.matrix_norm
    operator = norm(out - truth, 2) / (norm(weights, 2) * norm(v, 2))
    # norms below are bounded from below, so the ratio errs upwards; by how much, on this matrix, is the second bound
    assert (report.operator_error >= operator).all()
    assert (report.operator_error <= 2 * operator).all()


def test_sampled_hardness_where_a_sink_dominates():
    n = 1000
    q, k, v = problem(heads=1, kv_heads=1, queries=n, keys=n, batch=1)
    q[..., 0], k[..., 0, 0] = 8.0, 3.0
    weights, scores = softmax_matrix(q, k)
    truth = weights @ v
    out = corrupted(truth)
    report = audit(q, k, v, out, rows=128, is_causal=True)
    alpha = n * weights.square().sum(-2).amax(-1)
    # a sink's column is the mean of 128 squares, each between 0 and 1
    assert (report.alpha / alpha - 1).abs() <= 4.5 / math.sqrt(128)
    place = torch.arange(n)
    light = (place >= 16) & (place <= place[:, None] - 512)
    sums = scores.masked_fill(~light, -torch.inf).logsumexp(-1)[..., 16 + 512 :]
    assert 1 < report.kappa <= (sums.amax(-1) - sums.amin(-1)).exp()
    norm = torch.linalg.matrix_norm
    operator = norm(out - truth, 2) / (norm(weights, 2) * norm(v, 2))
    assert 0.5 * operator <= report.operator_error <= 3 * operator


def test_a_diagonal_softmax_is_not_taken_for_a_larger_one():
    # sampled rows of the identity have norm 1, and scaled by sqrt(queries / rows) they would seem to have 4
    n = 1024
    q = 60 * torch.nn.functional.normalize(torch.randn(1, 1, n, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    v = torch.randn(1, 1, n, 8, generator=torch.Generator().manual_seed(1))
    out = scaled_dot_product_attention(q, q, v, scale=1.0)
    report = audit(q, q, v, torch.zeros_like(out), scale=1.0)
    assert_exact(out.round(decimals=3), v.round(decimals=3))
    # the whole output is wrong: its error in this norm is 1, and the estimate errs upwards
    assert 0.9 <= report.operator_error.item() <= 2.5


def test_method_gives_share_of_pairs_and_heavy_mask():
    q, k, v = problem(heads=1, kv_heads=1)
    out = exact(q, k, v)
    method = ha.Method(ha.Sinks(4), ha.Window(32))
    report = audit(q, k, v, out, is_causal=True, method=method)
    assert report.share_of_pairs == method.cost(300, is_causal=True).share_of_exact
    assert_same_bits(report.kappa, audit(q, k, v, out, is_causal=True, heavy=(4, 32)).kappa)
    assert audit(q, k, v, out, is_causal=True, method=ha.Exact()).share_of_pairs == 1
    assert audit(q, k, v, out, is_causal=True).share_of_pairs is None
    assert audit(q[:, :, :9], k, v, out[:, :, :9], method=method).share_of_pairs is None


def test_kappa_is_nan_where_the_heavy_mask_covers_all():
    q, k, v = problem()
    assert audit(q, k, v, exact(q, k, v), is_causal=True, enable_gqa=True).kappa.isnan().all()
    assert (audit(q, k, v, exact(q, k, v), is_causal=False, enable_gqa=True, heavy=(0, 10)).kappa >= 1).all()


def test_same_seed_same_report_and_torch_rng_untouched():
    q, k, v = problem()
    out = corrupted(exact(q, k, v))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (
        audit(q, k, v, out, is_causal=True, enable_gqa=True, seed=seed).relative_error for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(again, first)
    assert (first != other).any()


def test_half_precision_output_is_judged_in_float32():
    q, k, v = problem(dtype=torch.bfloat16)
    truth = exact(q.float(), k.float(), v.float())
    report = audit(q, k, v, truth.bfloat16(), rows=300, is_causal=True, enable_gqa=True)
    # rows are computed in float32, whose rounding is of their size, not of the error's
    assert_exact(report.relative_error, row_errors(truth.bfloat16().float(), truth).mean(-1), size=1 / 16)


def test_broken_rows_are_not_hidden():
    q, k, v = problem()
    out = exact(q, k, v)
    out[1, 1] = torch.nan
    report = audit(q, k, v, out, is_causal=True, enable_gqa=True)
    assert report.relative_error.isnan().tolist() == [[False, False], [False, True]]
    assert report.operator_error[1, 1].isnan()
    assert report.interval[1][1, 1].isnan()
    assert "worst: head 1 of batch 1, nan" in str(report)
    zero = audit(q, k, 0 * v, torch.zeros_like(out), is_causal=True, enable_gqa=True)
    assert (zero.relative_error == 0).all()
    off = audit(q, k, 0 * v, torch.ones_like(out), is_causal=True, enable_gqa=True)
    assert (off.relative_error == torch.inf).all()


def test_report_prints_one_line():
    q, k, v = problem()
    out = corrupted(exact(q, k, v))
    report = audit(q, k, v, out, is_causal=True, enable_gqa=True, method=ha.Exact())
    low, high = (end.double().mean().item() for end in report.interval)
    expected = (
        f"relative error {report.relative_error.double().mean().item():.2g} (95% CI {low:.2g}-{high:.2g}), 64 rows a head"
    )
    assert str(report).startswith(expected + ", 1 of exact's pairs; worst: head ")
    alone = audit(q[:1, :1], k[:1], v[:1], out[:1, :1], is_causal=True)
    assert "worst" not in str(alone)
    assert "\n" not in str(report)


def test_too_few_rows_are_reported_without_an_interval():
    q, k, v = problem()
    out = corrupted(exact(q, k, v))
    few, enough = (audit(q, k, v, out, rows=rows, is_causal=True, enable_gqa=True) for rows in (15, 16))
    assert few.interval[0].isfinite().all()
    mean = f"{few.relative_error.double().mean().item():.2g}"
    assert str(few).startswith(f"relative error {mean}, 15 rows a head (too few for an interval: at least 16); worst: head ")
    assert "95% CI" not in str(few)
    assert str(enough).count("95% CI") == 2
    assert "too few" not in str(enough)


def test_audit_needs_no_gradient_and_leaves_none():
    q, k, v = (x.requires_grad_() for x in problem())
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    report = audit(q, k, v, out, is_causal=True, enable_gqa=True)
    assert not report.relative_error.requires_grad


@pytest.mark.parametrize("queries", [1, 2, 3, 59, 65])
def test_short_sequences(queries):
    q, k, v = problem(queries=queries, keys=queries)
    report = audit(q, k, v, exact(q, k, v), is_causal=True, enable_gqa=True)
    assert report.num_rows == min(64, queries)
    assert (report.relative_error < 100 * torch.finfo(torch.float32).eps).all()
    assert audit(q, k, v, exact(q, k, v), rows=1, is_causal=True, enable_gqa=True).num_rows == 1


def test_bad_input_says_what_to_do():
    q, k, v = problem()
    out = exact(q, k, v)
    with pytest.raises(ValueError, match=r"out has shape \(2, 2, 300, 11\), but .* \(2, 2, 300, 12\)"):
        check_audit(q, k, v, out[..., :11], 64)
    for rows in (0, -1):
        with pytest.raises(ValueError, match="rows to audit: give a positive integer"):
            check_audit(q, k, v, out, rows)
    with pytest.raises(ValueError, match="300 queries and 0 keys"):
        audit(q, k[:, :, :0], v[:, :, :0], out, enable_gqa=True)
    with pytest.raises(TypeError, match="out is list"):
        check_tensors(query=q, out=[1.0])
    with pytest.raises(TypeError, match=r"value is torch\.int64"):
        check_tensors(query=q, value=v.long())
    with pytest.raises((ValueError, TypeError)):
        audit(q, k, v, out[..., :11], enable_gqa=True)
    with pytest.raises((ValueError, TypeError)):
        audit(q, k, v[:, :, 1:], out, enable_gqa=True)
    with pytest.raises(ValueError, match="head counts differ"):
        audit(q, k, v, out)
    with pytest.raises(ValueError, match="seed"):
        audit(q, k, v, out, enable_gqa=True, seed=-1)
    with pytest.raises(ValueError, match="causal_align"):
        audit(q, k, v, out, enable_gqa=True, causal_align="left")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_the_error_alone_is_that_of_the_full_report(causal, masked):
    q, k, v = tensors(70, heads=4, batch=2)
    mask = torch.arange(70) >= torch.tensor([[0], [9]]) if masked else None
    options = {"is_causal": causal, "enable_gqa": True, "rows": 16, "key_mask": mask}
    out = torch.randn(q.shape[:3] + v.shape[3:], generator=torch.Generator().manual_seed(0))
    full, alone = ha.audit(q, k, v, out, **options), ha.audit(q, k, v, out, **options, hardness=False)
    assert_exact(alone.relative_error, full.relative_error)
    for x, y in zip(alone.interval, full.interval, strict=True):
        assert_exact(x, y)
    assert torch.equal(alone.num_empty, full.num_empty)
    assert not torch.isnan(full.alpha).any()
    for x in (alone.alpha, alone.kappa, alone.operator_error):
        assert torch.isnan(x).all()


def test_a_device_judges_in_few_operations_what_a_cpu_judges_in_many():
    scores = torch.randn(2, 3, 7, 40, generator=torch.Generator().manual_seed(0))
    counts, windows = [0, 1, 5, 20, 39, 40, 40], [(-3, 2), (0, 9), (1, 4), (10, 40), (30, 99), (5, 5), (-2, -1)]
    one, other = scores.clone(), scores.clone()
    hide_later(one, counts, at_once=False)
    hide_later(other, counts, at_once=True)
    assert_same_bits(one, other)
    weights = scores.exp()
    for first in (0, 3, 40):
        ours, plain = (light_weight(weights, first, windows, at_once=at_once) for at_once in (True, False))
        assert_exact(ours, plain)
    assert not torch.equal(light_weight(weights, 0, windows), weights.sum(-1))
