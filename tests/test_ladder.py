"""Ladders, and the pilot that chooses from their rungs."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import hyperattention as ha
from assertions import assert_exact
from front_door import within
from hyperattention import select
from hyperattention.error.tolerance import certificate, pilot
from hyperattention.error.tolerance import within as tolerance
from hyperattention.error.tolerance.ladder import ALIKE_CROSSOVER, Ladder, default_ladder
from hyperattention.error.tolerance.terms import CONFIDENCE, terms_of
from hyperattention.methods.method import Method
from hyperattention.problem import Problem
from problems import tensors
from tolerance_cases import LADDER, NUM, OPTIONS, easy, errors, inputs

# rungs as those of the default ladder of a long call, for short ones
ALIKE = Ladder(
    tuple(
        Method(ha.Sinks(4), ha.Window(16), select.DrawAlike(num, rows=32, pooled=4), tile=32) for num in (32, 64, 128, 256)
    )
)


# the choice of rungs


@pytest.mark.parametrize("power", [0.6, 0.8, 1.2])
@pytest.mark.parametrize("wanted", range(6))
def test_two_probes_find_the_cheapest_rung_that_will_do(monkeypatch, power, wanted):
    pairs = [100.0 * 2**place for place in range(6)]
    rungs = [Method(ha.Draw(int(num))) for num in pairs]
    aim = certificate.Aim(0.1, 0.001, 10**6, torch.ones(1, 1))
    # every row errs alike, so the rungs from `wanted` on are certified: by the rows that each of them asks for
    level = next(
        x / 1000
        for x in range(100, 0, -1)
        if aim.foresee(torch.full((1, 1, 96), x / 1000), round(pilot._ROOM * aim.rows(pairs[wanted])))
    )
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


# draws for alike queries


def test_draws_for_alike_queries_are_within_a_tolerance_and_spare_pairs():
    q, k, v = easy(num=4096)
    out, report = within(q, k, v, **(OPTIONS | {"method": ALIKE}), tolerance=0.25)
    approximated = len(report.methods) - len(report.exact_heads)
    assert approximated > 0
    assert report.share_of_pairs < 1
    error = errors(out, q, k, v, is_causal=True)
    assert (error <= 0.25).all()
    assert (error <= report.bound + 1e-5).all()
    assert (error > 0).any()


def test_a_pilot_shows_the_errors_that_draws_for_alike_queries_have_in_the_whole_call():
    whole = Problem(*easy(), 8**-0.5, causal=True, seed=3, layer=2)
    few = pilot.take_pilot(whole, 32)
    position = few.problem.position[few.index]
    rung = ALIKE.rungs[1]
    told = few.errors(rung, (0, 1)).flatten(1, 2)
    out = rung.attend(whole).out[:, :, position]
    assert_exact(told, certificate.row_errors(out, certificate.exact_at(whole, position)))
    # half of the tiles, and no more scored than they see
    assert few.problem.num_queries == NUM / 2


# ladders


@pytest.mark.parametrize(("num_keys", "device"), [(16_383, None), (8192, "cpu"), (16_383, "cuda")])
def test_the_ladder_of_short_calls_stands_around_the_lean_method(num_keys, device):
    ladder = default_ladder(num_keys, device=device)
    usual = ha.lean_method(65_536)
    same = [rung for rung in ladder.rungs if rung.stages[-1].num == usual.stages[-1].num]
    assert [rung.stages[:-1] for rung in same] == [usual.stages[:-1]]
    assert same[0].stages[-1].by == ha.KeyScan(8, beyond=usual.stages[-1].by)
    assert_draws_double_every_second_rung(ladder, num_keys)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cuda", torch.device("cuda", 0)])
@pytest.mark.parametrize("num_keys", [16_384, 10**6])
def test_the_ladder_of_long_calls_draws_for_alike_queries_on_every_device(num_keys, device):
    ladder = default_ladder(num_keys, device=device)
    assert ladder.rungs == default_ladder(num_keys).rungs
    # the default's window, and longer lists than the default's, so that choosing costs half as much
    assert {rung.stages[:-1] for rung in ladder.rungs} == {ha.default_method(10**6).stages[:-1]}
    assert {replace(rung.stages[-1], num=1) for rung in ladder.rungs} == {select.DrawAlike(1, rows=128)}
    assert_draws_double_every_second_rung(ladder, num_keys)


def assert_draws_double_every_second_rung(ladder, num_keys):
    draws = [rung.stages[-1].num for rung in ladder.rungs]
    assert draws[0] < 688 / 3
    assert num_keys / 2 < draws[-1] <= num_keys
    assert all(1.3 < above / below < 1.5 for below, above in pairwise(draws))


def test_a_ladder_of_no_keys_has_a_rung():
    assert default_ladder(1).rungs


@pytest.mark.parametrize(("device", "crossover"), [(None, 4096), ("cpu", 4096), ("cuda", 65_536)])
def test_a_rung_is_worth_the_share_of_pairs_that_the_lean_method_spends_where_it_begins_to_pay(device, crossover):
    # exact attention is the faster one on a GPU up to longer lengths
    assert 0 < default_ladder(10**4, device=device).worth == share_of(ha.lean_method(65_536), crossover) < 1


def test_a_rung_for_alike_queries_is_worth_a_quarter_more_than_its_share_where_it_begins_to_pay():
    ladder = default_ladder(10**5)
    usual = next(rung for rung in ladder.rungs if rung.stages[-1].num == 1760)
    assert ladder.worth == 1.25 * share_of(usual, ALIKE_CROSSOVER) < 1
    # on a GPU no rung may run that takes more than a quarter longer than exact attention where the default begins there
    assert default_ladder(10**5, device="cuda").worth == 1.25 * share_of(usual, 65_536) < ladder.worth
    # what takes equal time at one length does so at all, as long as all keys are scored one by one
    draws = replace(usual.stages[-1], most=2 * ALIKE_CROSSOVER)
    one, double = (Method(*usual.stages[:-1], each, tile=128) for each in (draws, replace(draws, num=2 * 1760 + 336)))
    # a query sees itself as well: exact attention scores half a key more than half of the keys
    assert share_of(double, 2 * ALIKE_CROSSOVER) == pytest.approx(share_of(one, ALIKE_CROSSOVER), rel=1 / ALIKE_CROSSOVER)


def share_of(method, num_keys):
    cost = method.cost(num_keys)
    # the choice of keys is part of the price
    assert cost.selection_pairs > 0
    return (cost.pairs + cost.selection_pairs) / cost.exact_pairs


def test_the_default_ladder_is_climbed_without_a_name():
    q, k, v = tensors(8192, heads=1, kv_heads=1)
    _, report = within(0.4 * q, k, v + 0.5, is_causal=True, tolerance=0.3)
    assert report.methods[0] in default_ladder(8192).rungs


def test_no_pilot_is_run_where_even_the_cheapest_rung_would_save_nothing(monkeypatch):
    monkeypatch.setattr(tolerance, "take_pilot", None)
    q, k, v = easy(num=512)
    # its pairs are fewer than exact attention's, but not with the pilot's tiles, which are half of the queries
    narrow = Ladder(LADDER.rungs[:1], worth=0.4)
    assert LADDER.rungs[0].cost(512).share_of_exact < 0.21
    _, report = within(q, k, v, tolerance=0.9, **(OPTIONS | {"method": narrow}))
    assert "no rung is worth running" in str(report)


def test_heads_and_attempts_share_the_chance_of_a_wrong_bound():
    q, k, v = easy(batch=3)
    terms = terms_of(Problem(q, k, v, 1.0, causal=True), 0.2, lse=False)
    assert sum(aim.chance for aim in terms.aims) * 3 * 4 == pytest.approx(1 - CONFIDENCE)


@pytest.mark.parametrize(
    ("rungs", "error", "message"),
    [
        ((), ValueError, "at least one rung"),
        ((Method(ha.HashBuckets(16), ha.Draw(16)),), ValueError, "a few queries cannot show its error"),
        ((Method(ha.Draw(16)), Method(ha.Draw(32), tile=16)), ValueError, "one tile size"),
        ((Method(ha.Draw(32)), Method(ha.Draw(16))), ValueError, "by increasing cost"),
    ],
)
def test_ladders_that_cannot_be_climbed(rungs, error, message):
    with pytest.raises(error, match=message):
        Ladder(rungs)


def test_each_rung_lists_more_pairs_than_the_one_before():
    few, other, more = Method(ha.Draw(8)), Method(ha.Draw(8, by=ha.HierarchicalSearch())), Method(ha.Draw(9))
    assert Ladder((few, more)).rungs == (few, more)
    for rungs in ((few, few), (few, other), (few, more, more), (more, few)):
        with pytest.raises(ValueError, match="order the rungs by increasing cost"):
            Ladder(rungs)


def test_a_rung_that_is_no_list_of_stages_is_refused(run_python):
    # by the class itself, which the annotations forestall under the import hook
    code = "import hyperattention as ha\ntry: ha.Ladder((ha.Exact(),))\nexcept TypeError as error: print(error)"
    assert "not Exact()" in run_python(code)
