"""Error as an argument: no head above tolerance silently, exact where it must be, and no more spent than that takes."""

from itertools import pairwise

import pytest
import torch

import hyperattention as ha
from assertions import assert_exact, assert_same_bits
from front_door import padded
from hyperattention import certificate, pilot, tolerance
from hyperattention.inputs import check_tolerance
from hyperattention.ladder import Ladder, default_ladder
from hyperattention.method import Method
from hyperattention.problem import Problem
from problems import tensors

NUM = 1024
LADDER = Ladder(tuple(Method(ha.Sinks(4), ha.Window(16), ha.Draw(num), tile=16) for num in (16, 32, 64, 128, 256)))
# heads of a group share a fate: two query heads each
SHAPE = {"heads": 4, "kv_heads": 2}
OPTIONS = {"is_causal": True, "enable_gqa": True, "method": LADDER}


def inputs(seed=0, num=NUM, **shape):
    """A head that draws serve well, and one that looks for single far keys, which draws miss."""
    q, k, v = tensors(num, seed=seed, **(SHAPE | shape))
    q[:, :2] *= 0.4
    v[:, :1] += 1.0
    q[:, 2:] = 12 * k[:, 1:].roll(num // 2, 2)[:, :, -q.shape[2] :]
    return q, k, v


def easy(seed=0, num=NUM, **shape):
    q, k, v = tensors(num, seed=seed, **(SHAPE | shape))
    return 0.4 * q, k, v + 0.5


def errors(out, q, k, v, **options):
    exact = ha.attention(q, k, v, enable_gqa=True, method=ha.Exact(), **options)
    norm = exact.norm(dim=-1)
    error = ((out - exact).norm(dim=-1) / norm).masked_fill(norm == 0, 0.0)
    return error.sum(-1) / (norm > 0).sum(-1)


def test_calls_are_within_tolerance_and_within_their_bounds():
    calls, approximated, held, above = 60, 0, 0, 0
    for seed in range(calls):
        allowed = (0.3, 0.2, 0.15)[seed % 3]
        q, k, v = easy(seed) if seed % 2 else inputs(seed)
        out, report = ha.attention(q, k, v, tolerance=allowed, seed=seed, **OPTIONS)
        error = errors(out, q, k, v, is_causal=True)
        held += bool((error <= report.bound + 1e-5).all())
        above += bool((error > allowed).any())
        approximated += len(report.exact_heads) < 2
        assert (report.bound <= allowed).all()
    assert above <= (1 - tolerance.CONFIDENCE) * calls
    assert held >= tolerance.CONFIDENCE * calls
    assert approximated >= calls / 2


def test_a_mean_in_place_of_the_bound_would_be_noticed(monkeypatch):
    # the twin of the test above: rungs that err by just about the tolerance are let through by chance
    monkeypatch.setattr(certificate, "mean_bound", lambda errors, chance: errors.double().mean(-1))
    monkeypatch.setattr(certificate.Aim, "foresee", lambda aim, errors, pairs: errors.mean(-1) <= aim.tolerance)
    monkeypatch.setattr(pilot, "_raised", lambda errors, tiles: errors)
    above = 0
    for seed in range(20):
        q, k, v = easy(seed)
        out, _ = ha.attention(q, k, v, tolerance=0.17, seed=seed, **OPTIONS)
        above += bool((errors(out, q, k, v, is_causal=True) > 0.17).any())
    assert above > 0.05 * 20


def test_a_hard_head_runs_exactly_and_is_told_of():
    q, k, v = inputs()
    out, report = ha.attention(q, k, v, tolerance=0.2, **OPTIONS)
    assert report.exact_heads == (1,)
    assert isinstance(report.methods[1], ha.Exact)
    assert_same_bits(out[:, 2:], ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=ha.Exact())[:, 2:])
    assert (report.bound[:, 2:] == 0).all()
    assert (report.bound[:, :2] > 0).all()
    assert report.num_rows[0] > 0
    assert "ran exactly: kv heads 1 of 2" in str(report)
    assert "95% confidence" in str(report)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["exact last", "exact first"])
def test_the_output_is_that_of_the_methods_reported(order):
    q, k, v = inputs()
    q, k, v = q.unflatten(1, (2, 2))[:, order].flatten(1, 2), k[:, order], v[:, order]
    options = {"is_causal": True, "enable_gqa": True, "seed": 5, "layer": 3}
    out, lse, report = ha.attention(q, k, v, tolerance=0.2, return_lse=True, **options, method=LADDER)
    again, lse_again = ha.attention(q, k, v, return_lse=True, **options, method=ha.ByHead(report.methods))
    assert len(set(report.methods)) == 2
    assert_same_bits(out, again)
    assert_same_bits(lse, lse_again)


def test_fewer_pairs_are_spent_where_more_error_is_allowed():
    q, k, v = easy()
    spent = [ha.attention(q, k, v, tolerance=allowed, **OPTIONS)[1].share_of_pairs for allowed in (0.4, 0.3, 0.001)]
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
    _, report = ha.attention(q, k, v, tolerance=0.2, **OPTIONS)
    assert not report.exact_heads
    # exact rows are counted by their number, each as long as the mean row
    assert report.share_of_pairs == pytest.approx(sum(scored) / (4 * NUM * (NUM + 1) / 2), rel=0.02)


def test_a_pilot_runs_no_whole_rung(monkeypatch):
    q, k, v = inputs(num=4096)
    seen, attend = [], Method.attend
    monkeypatch.setattr(Method, "attend", lambda method, problem: seen.append((method, problem)) or attend(method, problem))
    _, report = ha.attention(q, k, v, tolerance=0.2, **OPTIONS)
    whole = [method for method, problem in seen if problem.spans is None]
    assert whole == [method for method in dict.fromkeys(report.methods) if isinstance(method, Method)]
    tiles = [problem.num_queries / method.tile for method, problem in seen if problem.spans is not None]
    assert tiles
    assert max(tiles) <= 16
    assert len(tiles) <= 4


def test_a_head_that_fails_moves_up_with_fresh_rows(monkeypatch):
    q, k, v = easy()
    drawn = []
    choice = pilot.Choice((0, 0), ((0,), (0,)))
    monkeypatch.setattr(tolerance, "choose", lambda *_: choice)
    draw = certificate.fresh_rows
    monkeypatch.setattr(tolerance, "fresh_rows", lambda *x: drawn.append(draw(*x)) or drawn[-1])
    out, report = ha.attention(q, k, v, tolerance=0.4, **OPTIONS)
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
    out, report = ha.attention(q, k, v, tolerance=0.5, **OPTIONS)
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
    out, report = ha.attention(q, k, v, tolerance=1e-6, **OPTIONS)
    assert report.exact_heads == (0, 1)
    assert report.share_of_pairs == 1
    assert "no rung is worth running" in str(report)
    assert_same_bits(out, ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=ha.Exact()))


def test_values_that_are_not_finite_vouch_for_nothing():
    q, k, v = easy()
    v[:, 0, 100] = torch.nan
    _, report = ha.attention(q, k, v, tolerance=0.3, **OPTIONS)
    assert 0 in report.exact_heads


@pytest.mark.parametrize("piloted", [True, False])
@pytest.mark.parametrize(("entry", "member"), [(0, 0), (1, 1)])
def test_one_hard_query_head_of_one_entry_fails_its_kv_head_alone(monkeypatch, entry, member, piloted):
    if not piloted:
        monkeypatch.setattr(tolerance, "choose", lambda *_: pilot.Choice((4, 4), ((4,), (4,))))
    q, k, v = easy(batch=2)
    q[entry, 2 + member] = 12 * k[entry, 1].roll(NUM // 2, 0)
    out, report = ha.attention(q, k, v, tolerance=0.3, **OPTIONS)
    assert report.exact_heads == (1,)
    assert (errors(out, q, k, v, is_causal=True) <= 0.3).all()


# the choice of rungs


@pytest.mark.parametrize("power", [0.6, 0.8, 1.2])
@pytest.mark.parametrize("wanted", range(6))
def test_two_probes_find_the_cheapest_rung_that_will_do(monkeypatch, power, wanted):
    pairs = [100.0 * 2**place for place in range(6)]
    rungs = [Method(ha.Draw(int(num))) for num in pairs]
    aim = certificate.Aim(0.1, 0.001, 10**6, torch.ones(1, 1))
    # every row errs alike, so the rungs from `wanted` on are certified: by the rows that each of them asks for
    level = next(x / 1000 for x in range(100, 0, -1) if aim.foresee(torch.full((1, 1, 96), x / 1000), pairs[wanted]))
    probed = []

    def errors(self, rung, heads):
        probed.append(rung)
        return torch.full((1, len(heads), 1, 96), level * (pairs[wanted] / rung.stages[0].num) ** power)

    monkeypatch.setattr(pilot.Pilot, "errors", errors)
    few = pilot.take_pilot(Problem(*tensors(600, heads=1, kv_heads=1), 1.0, causal=True), 16)
    choice = pilot.choose(few, rungs, pairs, aim)
    # a power fitted from rungs not next to it may miss by one
    assert choice.rungs[0] in (wanted, wanted + 1)
    assert len(probed) <= 2
    assert choice.probed == (tuple(rungs.index(rung) for rung in probed),)


def test_a_head_that_no_rung_can_serve_is_probed_no_more():
    few = pilot.take_pilot(Problem(*inputs(), 8**-0.5, causal=True), 16)
    aim = certificate.Aim(0.2, 0.01, NUM, torch.ones(1, 1))
    choice = pilot.choose(few, LADDER.rungs, [rung.cost(NUM).pairs for rung in LADDER.rungs], aim)
    assert choice.rungs[1] is None
    assert choice.rungs[0] is not None
    assert choice.probed[1] == (2,)


def test_the_power_is_fitted_to_the_worst_query_head():
    one, two = torch.full((1, 2, 8), 0.1), torch.full((1, 2, 8), 0.01)
    one[:, 1], two[:, 1] = 0.4, 0.2
    assert pilot._fitted({3: one, 5: two}, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]) == pytest.approx(0.5)
    assert pilot._fitted({3: one, 5: two * 0}, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]) == pilot._POWER


def test_estimates_are_raised_by_their_standard_error():
    by_tile = torch.tensor([0.1, 0.3, 0.1, 0.3])
    errors = by_tile.repeat_interleave(8)[None, None]
    # neighbours differ by 0.2: a deviation of 0.2 / sqrt 2 a tile, of half as much in the mean of four
    assert_exact(pilot._raised(errors, 4).mean(), torch.tensor(0.2 + 0.1 / 2**0.5))
    # a rise with position is no chance
    steady = torch.linspace(0.1, 0.3, 32)[None, None]
    assert pilot._raised(steady, 16).mean() < 1.02 * steady.mean()


# the other arguments


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
    out, report = ha.attention(q, k, v, enable_gqa=True, method=LADDER, tolerance=0.3, **options)
    assert not report.exact_heads
    assert report.share_of_pairs < 1
    error = errors(out, q, k, v, **options)
    assert (error <= report.bound).all()
    assert (report.bound <= 0.3).all()
    assert (report.bound < 4 * error).all()


def test_the_output_is_judged_as_it_is_returned(monkeypatch):
    judged, judge = [], tolerance.row_errors
    monkeypatch.setattr(
        tolerance, "row_errors", lambda rows, exact: judged.append((rows.dtype, exact.dtype)) or judge(rows, exact)
    )
    q, k, v = (x.bfloat16() for x in easy())
    out, report = ha.attention(q, k, v, tolerance=0.3, **OPTIONS)
    assert out.dtype == torch.bfloat16
    assert not report.exact_heads
    assert set(judged) == {(torch.bfloat16, torch.float32)}


def test_gradients_are_those_of_the_methods_reported():
    q, k, v = (x.requires_grad_() for x in inputs())
    out, lse, report = ha.attention(q, k, v, tolerance=0.2, return_lse=True, **OPTIONS)
    plain = ha.attention(q, k, v, return_lse=True, **(OPTIONS | {"method": ha.ByHead(report.methods)}))
    assert len(set(report.methods)) == 2
    ours, expected = (torch.autograd.grad(x.square().sum() + y.sum(), (q, k, v)) for x, y in ((out, lse), plain))
    for x, y in zip(ours, expected, strict=True):
        assert_exact(x, y)


def test_reports_come_in_order():
    q, k, v = easy()
    results = ha.attention(q, k, v, tolerance=0.3, audit=64, return_lse=True, **OPTIONS)
    assert [type(x) for x in results] == [torch.Tensor, torch.Tensor, ha.ErrorReport, ha.ToleranceReport]
    assert results[2].relative_error.max() > 0


def test_short_calls_and_dense_masks_are_exact_and_say_so():
    q, k, v = easy(num=64)
    mask = torch.rand(64, 64) < 0.9
    for options, note in (({}, "below the crossover"), ({"attn_mask": mask}, "dense attn_mask"),
                          ({"method": LADDER, "is_causal": True}, "no rung is worth running")):  # fmt: skip
        out, report = ha.attention(q, k, v, enable_gqa=True, tolerance=0.1, **options)
        assert report.exact_heads == (0, 1)
        assert note in str(report)
        options.pop("method", None)
        assert_exact(out, ha.attention(q, k, v, enable_gqa=True, method=ha.Exact(), **options))
    few = Ladder((Method(ha.Draw(2), tile=16),))
    _, report = ha.attention(*easy(num=63), tolerance=0.99, **(OPTIONS | {"method": few}))
    assert "too few whole tiles" in str(report)


@pytest.mark.parametrize(("queries", "keys", "batch"), [(0, 0, 1), (5, 0, 1), (0, 5, 1), (5, 5, 0)])
def test_nothing_to_attend_to(queries, keys, batch):
    q, k, v = tensors(queries, keys, batch=batch, **SHAPE)
    out, report = ha.attention(q, k, v, tolerance=0.1, **OPTIONS)
    assert out.shape == q.shape
    assert report.share_of_pairs == 1
    assert "exact" in str(report)


def test_a_batch_entry_that_sees_nothing_forces_nothing():
    q, k, v = easy(batch=2)
    mask = torch.ones(2, NUM, dtype=torch.bool)
    mask[1] = False
    out, report = ha.attention(q, k, v, tolerance=0.3, key_mask=mask, **OPTIONS)
    assert not report.exact_heads
    assert (out[1] == 0).all()


def test_all_padding_of_a_short_call():
    q, k, v = tensors(30, batch=2, **SHAPE)
    _, report = ha.attention(q, k, v, tolerance=0.3, key_mask=padded("all"), **OPTIONS)
    assert len(report.exact_heads) == 2


# ladders


def test_the_default_ladder_stands_around_the_default_method():
    ladder = default_ladder(32768)
    assert ha.default_method(32768) in ladder.rungs
    draws = [rung.stages[-1].num for rung in ladder.rungs]
    assert draws[0] < 688 / 3
    assert 16384 < draws[-1] <= 32768
    assert all(1.3 < above / below < 1.5 for below, above in pairwise(draws))
    assert 0.3 < ladder.worth < 1
    # exact attention is the faster one on a GPU up to longer lengths
    assert default_ladder(32768, device="cuda").worth < ladder.worth
    assert default_ladder(1).rungs


def test_the_default_ladder_is_climbed_without_a_name():
    q, k, v = tensors(8192, heads=1, kv_heads=1)
    _, report = ha.attention(0.4 * q, k, v + 0.5, is_causal=True, tolerance=0.3)
    assert report.methods[0] in default_ladder(8192).rungs


def test_no_pilot_is_run_where_even_the_cheapest_rung_would_save_nothing(monkeypatch):
    monkeypatch.setattr(tolerance, "take_pilot", None)
    q, k, v = easy(num=512)
    # its pairs are fewer than exact attention's, but not with the pilot's tiles, which are half of the queries
    narrow = Ladder(LADDER.rungs[:1], worth=0.4)
    assert LADDER.rungs[0].cost(512).share_of_exact < 0.21
    _, report = ha.attention(q, k, v, tolerance=0.9, **(OPTIONS | {"method": narrow}))
    assert "no rung is worth running" in str(report)


def test_heads_and_attempts_share_the_chance_of_a_wrong_bound():
    q, k, v = easy(batch=3)
    call = tolerance._Call(Problem(q, k, v, 1.0, causal=True), 0.2, LADDER, lse=False)
    assert sum(aim.chance for aim in call.aims) * 3 * 4 == pytest.approx(1 - tolerance.CONFIDENCE)


@pytest.mark.parametrize(
    ("rungs", "error", "message"),
    [
        ((), ValueError, "at least one rung"),
        ((Method(ha.HashBuckets(16), ha.Draw(16)),), ValueError, "no few of them can tell"),
        ((Method(ha.Draw(16)), Method(ha.Draw(32), tile=16)), ValueError, "one tile size"),
        ((Method(ha.Draw(32)), Method(ha.Draw(16))), ValueError, "from cheap to dear"),
    ],
)
def test_ladders_that_cannot_be_climbed(rungs, error, message):
    with pytest.raises(error, match=message):
        Ladder(rungs)


def test_a_rung_that_is_no_list_of_stages_is_refused(run_python):
    # by the class itself, which the annotations forestall under the import hook
    code = "import hyperattention as ha\ntry: ha.Ladder((ha.Exact(),))\nexcept TypeError as error: print(error)"
    assert "not Exact()" in run_python(code)


def test_bad_arguments():
    q, k, v = tensors(30)
    for bad in (0.0, 1.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
            ha.attention(q, k, v, tolerance=bad)
    for bad in (True, "0.1"):
        with pytest.raises(TypeError, match="must be a number"):
            check_tolerance(bad, None)
    with pytest.raises(ValueError, match="leave one of them out"):
        ha.attention(q, k, v, tolerance=0.1, method=ha.Exact())
    with pytest.raises(ValueError, match="give tolerance"):
        ha.attention(q, k, v, method=LADDER)
    with pytest.raises(ValueError, match=r"worth=1.5"):
        Ladder(LADDER.rungs, worth=1.5)
    with pytest.raises(NotImplementedError, match="dropout"):
        ha.attention(q, k, v, tolerance=0.1, dropout_p=0.1)


def test_a_call_is_a_matter_of_its_seed():
    q, k, v = inputs()
    state = torch.random.get_rng_state()
    one, two = (ha.attention(q, k, v, tolerance=0.2, seed=3, **OPTIONS)[0] for _ in range(2))
    assert_same_bits(one, two)
    assert torch.equal(state, torch.random.get_rng_state())
