"""Error as an argument, beside all other arguments of the front door; and what is refused."""

import pytest
import torch

import hyperattention as ha
from assertions import assert_exact
from front_door import padded, with_lse, within
from hyperattention.error.tolerance import certificate
from hyperattention.error.tolerance import within as tolerance
from hyperattention.error.tolerance.ladder import Ladder, check_tolerance
from hyperattention.methods.method import Method
from problems import tensors
from tolerance_cases import LADDER, NUM, OPTIONS, SHAPE, easy, errors, inputs


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"batch": 2}, {"is_causal": True}),
        ({}, {"is_causal": False}),
        ({"dtype": torch.float64}, {"is_causal": True, "scale": 0.2}),
        ({"num_keys": 1100}, {"is_causal": True, "causal_align": "lower_right"}),
        ({"num_keys": 900}, {"is_causal": True, "causal_align": "lower_right"}),
        ({"batch": 2}, {"is_causal": True, "key_mask": torch.arange(NUM) >= torch.tensor([[0], [301]])}),
    ],
    ids=["batch", "full", "float64", "chunk", "empty rows", "padding"],
)
def test_other_arguments_are_read(shape, options):
    q, k, v = easy(**shape)
    out, report = within(q, k, v, enable_gqa=True, method=LADDER, tolerance=0.3, **options)
    assert not report.exact_heads
    assert report.share_of_pairs < 1
    error = errors(out, q, k, v, **options)
    assert (error <= report.bound).all()
    assert (report.bound <= 0.3).all()
    assert (report.bound < 4 * error).all()


def test_the_output_is_judged_as_it_is_returned(monkeypatch):
    judged, judge = [], certificate.row_errors
    monkeypatch.setattr(
        certificate, "row_errors", lambda rows, exact: judged.append((rows.dtype, exact.dtype)) or judge(rows, exact)
    )
    q, k, v = (x.bfloat16() for x in easy())
    out, report = within(q, k, v, tolerance=0.3, **OPTIONS)
    assert out.dtype == torch.bfloat16
    assert not report.exact_heads
    assert set(judged) == {(torch.bfloat16, torch.float32)}


def test_gradients_are_those_of_the_methods_reported():
    q, k, v = (x.requires_grad_() for x in inputs())
    result = ha.measured_attention(q, k, v, tolerance=0.2, **OPTIONS)
    assert result.tolerance is not None
    out, lse, report = result.out, result.lse, result.tolerance
    plain = with_lse(q, k, v, **(OPTIONS | {"method": ha.ByHead(report.methods)}))
    assert len(set(report.methods)) == 2
    ours, expected = (torch.autograd.grad(x.square().sum() + y.sum(), (q, k, v)) for x, y in ((out, lse), plain))
    for x, y in zip(ours, expected, strict=True):
        assert_exact(x, y)


def test_reports_come_by_name():
    q, k, v = easy()
    result = ha.measured_attention(q, k, v, tolerance=0.3, audit=64, **OPTIONS)
    assert isinstance(result.audit, ha.ErrorReport)
    assert isinstance(result.tolerance, ha.ToleranceReport)
    assert result.standard_error is None
    assert result.audit.relative_error.max() > 0


def test_short_calls_and_dense_masks_are_exact_and_say_so():
    q, k, v = easy(num=64)
    mask = torch.rand(64, 64) < 0.9
    for options, note in (
        ({}, "below the crossover"),
        ({"attn_mask": mask}, "dense attn_mask"),
        ({"method": LADDER, "is_causal": True}, "no rung is worth running"),
    ):
        out, report = within(q, k, v, enable_gqa=True, tolerance=0.1, **options)
        assert report.exact_heads == (0, 1)
        assert note in str(report)
        options.pop("method", None)
        assert_exact(out, ha.attention(q, k, v, enable_gqa=True, method=ha.Exact(), **options))
    few = Ladder((Method(ha.Draw(2), tile=16),))
    _, report = within(*easy(num=63), tolerance=0.99, **(OPTIONS | {"method": few}))
    assert "too few complete tiles" in str(report)


@pytest.mark.parametrize(("queries", "keys", "batch"), [(0, 0, 1), (5, 0, 1), (0, 5, 1), (5, 5, 0)])
def test_nothing_to_attend_to(queries, keys, batch):
    q, k, v = tensors(queries, keys, batch=batch, **SHAPE)
    out, report = within(q, k, v, tolerance=0.1, **OPTIONS)
    assert out.shape == q.shape
    assert report.share_of_pairs == 1
    assert "exact" in str(report)


def test_a_batch_entry_that_sees_nothing_forces_nothing():
    q, k, v = easy(batch=2)
    mask = torch.ones(2, NUM, dtype=torch.bool)
    mask[1] = False
    out, report = within(q, k, v, tolerance=0.3, key_mask=mask, **OPTIONS)
    assert not report.exact_heads
    assert (out[1] == 0).all()


def padded_to(live, num):
    """A batch whose second entry ends in `live` live keys, and in as many queries that see any."""
    return torch.arange(num) >= torch.tensor([[0], [num - live]])


def test_a_batch_entry_of_few_live_queries_is_certified():
    num = 4096
    q, k, v = easy(batch=2, num=num)
    options = {"is_causal": True, "key_mask": padded_to(400, num)}
    out, report = within(q, k, v, enable_gqa=True, method=LADDER, tolerance=0.3, **options)
    assert not report.exact_heads
    assert report.share_of_pairs < 1
    assert (errors(out, q, k, v, **options) <= report.bound).all()
    assert (report.bound <= 0.3).all()


def test_no_pilot_is_paid_where_too_few_queries_are_live_to_certify_them(monkeypatch):
    monkeypatch.setattr(tolerance, "take_pilot", None)
    q, k, v = easy(batch=2)
    _, report = within(q, k, v, tolerance=0.3, key_mask=padded_to(10, NUM), **OPTIONS)
    assert report.share_of_pairs == 1
    assert "no rung is worth running" in str(report)


def test_all_padding_of_a_short_call():
    q, k, v = tensors(30, batch=2, **SHAPE)
    _, report = within(q, k, v, tolerance=0.3, key_mask=padded("all"), **OPTIONS)
    assert len(report.exact_heads) == 2


def test_bad_arguments():
    q, k, v = tensors(30)
    for bad in (0.0, 1.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
            within(q, k, v, tolerance=bad)
    for bad in (True, "0.1"):
        with pytest.raises(TypeError, match="must be a number"):
            check_tolerance(bad, None)
    with pytest.raises(ValueError, match="leave one of them out"):
        within(q, k, v, tolerance=0.1, method=ha.Exact())
    with pytest.raises(ValueError, match="give tolerance"):
        ha.attention(q, k, v, method=LADDER)
    with pytest.raises(ValueError, match=r"worth=1.5"):
        Ladder(LADDER.rungs, worth=1.5)
    with pytest.raises(NotImplementedError, match="dropout"):
        within(q, k, v, tolerance=0.1, dropout_p=0.1)
