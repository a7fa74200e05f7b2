"""Error as an argument: no bound above the tolerance, exact where it must be, and no more spent than that takes."""

import math

import pytest
import torch

import hyperattention as ha
from assertions import assert_same_bits
from front_door import with_lse, within
from hyperattention.error.tolerance import certificate, pilot
from hyperattention.error.tolerance import within as tolerance
from hyperattention.methods.method import Method
from tolerance_cases import LADDER, NUM, OPTIONS, easy, errors, inputs


def rows_for(allowed):
    """Rows that the dearest rung's certificate is planned with."""
    aim = certificate.Aim(allowed, 0.05 * 0.8 / 4, NUM, torch.ones(1, 1))
    return aim.rows(LADDER.rungs[4].cost(NUM).pairs)


def test_calls_are_within_tolerance_and_within_their_bounds():
    calls, approximated, held, above = 60, 0, 0, 0
    for seed in range(calls):
        allowed = (0.3, 0.2, 0.15)[seed % 3]
        q, k, v = easy(seed) if seed % 2 else inputs(seed)
        out, report = within(q, k, v, tolerance=allowed, seed=seed, **OPTIONS)
        error = errors(out, q, k, v, is_causal=True)
        held += bool((error <= report.bound + 1e-5).all())
        above += bool((error > allowed).any())
        approximated += len(report.exact_heads) < 2
        assert (report.bound <= allowed).all()
    assert above <= (1 - tolerance.CONFIDENCE) * calls
    assert held >= tolerance.CONFIDENCE * calls
    assert approximated >= calls / 2


@pytest.mark.parametrize("bounded", [True, False], ids=["bound", "mean"])
def test_a_mean_in_place_of_the_bound_lets_rungs_through_by_chance(monkeypatch, bounded):
    # a rung whose error is just about the tolerance, whatever a pilot would have said
    monkeypatch.setattr(tolerance, "choose", lambda *_: pilot.Choice((3, 3), ((3,), (3,))))
    if not bounded:
        monkeypatch.setattr(certificate, "mean_bound", lambda errors, chance: errors.double().mean(-1))
    above = 0
    for seed in range(20):
        q, k, v = easy(seed)
        out, _ = within(q, k, v, tolerance=0.17, seed=seed, **OPTIONS)
        above += bool((errors(out, q, k, v, is_causal=True) > 0.17).any())
    assert above == 0 if bounded else above > 0.05 * 20


def test_a_hard_head_runs_exactly_and_is_told_of():
    q, k, v = inputs()
    out, report = within(q, k, v, tolerance=0.2, **OPTIONS)
    assert report.exact_heads == (1,)
    assert isinstance(report.methods[1], ha.Exact)
    assert_same_bits(out[:, 2:], ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=ha.Exact())[:, 2:])
    assert (report.bound[:, 2:] == 0).all()
    assert (report.bound[:, :2] > 0).all()
    assert report.num_rows[0] > 0
    assert "ran exactly: kv heads 1 of 2" in str(report)
    assert "95% confidence" in str(report)
    assert (report.excess == 0).all()
    assert "not bounded" not in str(report)


def test_what_is_estimated_and_not_bounded_is_told_of(monkeypatch):
    judge = certificate.row_errors

    def one_row_worse(rows, exact):
        found = judge(rows, exact)
        found[:, 0, 0] = 2.0
        return found

    monkeypatch.setattr(certificate, "row_errors", one_row_worse)
    monkeypatch.setattr(tolerance, "choose", lambda *_: pilot.Choice((4, 4), ((4,), (4,))))
    _, report = within(*easy(), tolerance=0.6, **OPTIONS)
    assert not report.exact_heads
    # one row of the first batch exceeds wholly wrong by one
    assert report.excess[0].tolist() == pytest.approx([1 / report.num_rows[0], 0.0, 0.0, 0.0])
    assert "estimated, not bounded" in str(report)


def test_a_trial_that_was_not_made_is_not_told_of(monkeypatch):
    monkeypatch.setattr(tolerance, "choose", lambda *_: pilot.Choice((None, None), ((2,), (2,))))
    _, report = within(*easy(), tolerance=0.4, **OPTIONS)
    assert report.exact_heads == (0, 1)
    assert "no rung was expected to come within 0.4" in str(report)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["exact last", "exact first"])
def test_the_output_is_that_of_the_methods_reported(order):
    q, k, v = inputs()
    q, k, v = q.unflatten(1, (2, 2))[:, order].flatten(1, 2), k[:, order], v[:, order]
    options = {"is_causal": True, "enable_gqa": True, "seed": 5, "layer": 3}
    result = ha.measured_attention(q, k, v, tolerance=0.2, **options, method=LADDER)
    assert result.tolerance is not None
    again, lse_again = with_lse(q, k, v, **options, method=ha.ByHead(result.tolerance.methods))
    assert len(set(result.tolerance.methods)) == 2
    assert_same_bits(result.out, again)
    assert_same_bits(result.lse, lse_again)


def test_fewer_pairs_are_spent_where_more_error_is_allowed():
    q, k, v = easy()
    spent = [within(q, k, v, tolerance=allowed, **OPTIONS)[1].share_of_pairs for allowed in (0.4, 0.3, 0.001)]
    assert spent[0] < spent[1] < 1 <= spent[2]


def test_share_of_pairs_is_what_was_scored(monkeypatch):
    q, k, v = easy()
    scored = []
    rows, attend = certificate.exact_rows, Method.attend

    def counted_rows(some, key, value, visible, scale):
        scored.append(visible.sum().item() * some.shape[1])
        return rows(some, key, value, visible, scale)

    def counted(method, problem):
        scored.append(method.cost(NUM).pairs * problem.num_queries * problem.q.shape[1])
        return attend(method, problem)

    monkeypatch.setattr(certificate, "exact_rows", counted_rows)
    monkeypatch.setattr(Method, "attend", counted)
    _, report = within(q, k, v, tolerance=0.2, **OPTIONS)
    assert not report.exact_heads
    # exact rows are counted by their number, each as long as the mean row
    assert report.share_of_pairs == pytest.approx(sum(scored) / (4 * NUM * (NUM + 1) / 2), rel=0.02)


def test_a_pilot_runs_no_whole_rung(monkeypatch):
    q, k, v = inputs(num=4096)
    seen, attend = [], Method.attend
    monkeypatch.setattr(Method, "attend", lambda method, problem: seen.append((method, problem)) or attend(method, problem))
    _, report = within(q, k, v, tolerance=0.2, **OPTIONS)
    whole = [method for method, problem in seen if problem.spans is None]
    assert whole == [method for method in dict.fromkeys(report.methods) if isinstance(method, Method)]
    tiles = [problem.num_queries / method.tile for method, problem in seen if problem.spans is not None]
    assert tiles
    assert max(tiles) <= 16
    assert len(tiles) <= 4


def test_rows_are_added_only_while_they_may_help(monkeypatch):
    monkeypatch.setattr(tolerance, "choose", lambda *_: pilot.Choice((4, 4), ((4,), (4,))))
    first = [math.ceil(aim_rows / 2) for aim_rows in (rows_for(0.2), rows_for(0.12))]
    # far within, and hopeless: the first batch says so
    _, report = within(*inputs(), tolerance=0.2, **OPTIONS)
    assert report.exact_heads == (1,)
    assert report.num_rows == (first[0], first[0])
    # errors of 0.1: the first batch cannot tell
    _, report = within(*easy(), tolerance=0.12, **OPTIONS)
    assert min(report.num_rows) >= 2 * first[1]


def test_a_head_that_fails_moves_up_with_fresh_rows(monkeypatch):
    q, k, v = easy()
    drawn = []
    choice = pilot.Choice((0, 0), ((0,), (0,)))
    monkeypatch.setattr(tolerance, "choose", lambda *_: choice)
    draw = certificate.fresh_rows
    monkeypatch.setattr(certificate, "fresh_rows", lambda *x: drawn.append(draw(*x)) or drawn[-1])
    out, report = within(q, k, v, tolerance=0.4, **OPTIONS)
    assert LADDER.rungs[0] not in report.methods
    assert len(report.exact_heads) < 2
    assert (errors(out, q, k, v, is_causal=True) <= 0.4).all()
    assert not torch.equal(*(rows[:30] for rows in drawn[:2]))
    # the rung given up was paid for
    assert report.share_of_pairs > sum(method.cost(NUM).pairs for method in (LADDER.rungs[0], report.methods[0])) / 512.5


def test_a_head_that_fails_twice_runs_exactly(monkeypatch):
    monkeypatch.setattr(certificate, "mean_bound", lambda errors, chance: torch.ones(errors.shape[:-1]))
    whole, attend = [], Method.attend
    monkeypatch.setattr(Method, "attend", lambda method, problem: whole.append((method, problem)) or attend(method, problem))
    q, k, v = easy()
    out, report = within(q, k, v, tolerance=0.5, **OPTIONS)
    assert report.exact_heads == (0, 1)
    assert (report.bound == 0).all()
    assert report.share_of_pairs > 1
    assert "no rung came within 0.5" in str(report)
    # two rungs a head, the second above the first, and one more to go
    for head in (0, 1):
        climbed = [LADDER.rungs.index(rung) for rung, part in whole if part.spans is None and head in part.head_index]
        assert len(climbed) == 2
        assert climbed[0] < climbed[1] < len(LADDER.rungs) - 1
    assert_same_bits(out, ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=ha.Exact()))


def test_next_to_no_tolerance_is_exact_before_anything_runs(monkeypatch):
    monkeypatch.setattr(Method, "attend", None)
    q, k, v = easy()
    out, report = within(q, k, v, tolerance=1e-6, **OPTIONS)
    assert report.exact_heads == (0, 1)
    assert report.share_of_pairs == 1
    assert "no rung is worth running" in str(report)
    assert_same_bits(out, ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=ha.Exact()))


def test_values_that_are_not_finite_vouch_for_nothing():
    q, k, v = easy()
    v[:, 0, 100] = torch.nan
    _, report = within(q, k, v, tolerance=0.3, **OPTIONS)
    assert 0 in report.exact_heads


@pytest.mark.parametrize("piloted", [True, False])
@pytest.mark.parametrize(("entry", "member"), [(0, 0), (1, 1)])
def test_one_hard_query_head_of_one_entry_fails_its_kv_head_alone(monkeypatch, entry, member, piloted):
    if not piloted:
        monkeypatch.setattr(tolerance, "choose", lambda *_: pilot.Choice((4, 4), ((4,), (4,))))
    q, k, v = easy(batch=2)
    q[entry, 2 + member] = 12 * k[entry, 1].roll(NUM // 2, 0)
    out, report = within(q, k, v, tolerance=0.3, **OPTIONS)
    assert report.exact_heads == (1,)
    assert (errors(out, q, k, v, is_causal=True) <= 0.3).all()


def test_a_call_is_a_matter_of_its_seed():
    q, k, v = inputs()
    state = torch.random.get_rng_state()
    one, two = (within(q, k, v, tolerance=0.2, seed=3, **OPTIONS)[0] for _ in range(2))
    assert_same_bits(one, two)
    assert torch.equal(state, torch.random.get_rng_state())


def test_standard_errors_are_refused_beside_a_tolerance():
    q, k, v = inputs(300)
    with pytest.raises(ValueError, match="leave one of them out"):
        ha.measured_attention(q, k, v, enable_gqa=True, tolerance=0.1, standard_error=True)
