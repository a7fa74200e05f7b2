"""The certificate: its bound covers however few rows are wrong, is nearly the tightest there is, and its rows are fresh."""

import math
from itertools import combinations

import pytest
import torch

from assertions import assert_exact
from hyperattention.error.tolerance import certificate
from hyperattention.error.tolerance.betting import STAKES, log_capital, mean_bound
from hyperattention.error.tolerance.certificate import Aim, certify, fresh_rows
from hyperattention.error.tolerance.pilot import take_pilot
from problems import problem
from test_interval import binomial_cdf, constant, gamma_half, lognormal, missed, population, samples, uniform

CHANCE = 0.05
ROWS = 185
ERRORS = {
    "lognormal 0.5": lognormal(0.1, 0.5),
    "lognormal 1": lognormal(0.1, 1.0),
    "gamma 0.5": gamma_half(0.1),
    "uniform": uniform(0.1),
    "constant": constant(0.05),
    "0.5% wholly wrong": missed(0.005, lambda g, n: torch.ones(n)),
    "2% wholly wrong": missed(0.02, lambda g, n: torch.ones(n)),
    "10% wholly wrong": missed(0.1, lambda g, n: torch.ones(n)),
}
# rows may be worse than wholly wrong: what they exceed it by is estimated, not bounded
EXCESS = {
    "2% half to one and a half wrong": missed(0.02, lambda g, n: 0.5 + torch.rand(n, generator=g)),
    "1% wrong by two among errors of 0.1": missed(0.01, lambda g, n: torch.full((n,), 2.0), bulk=0.1),
}


def clopper_pearson(wrong, rows, chance):
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_cdf(wrong, rows, middle) > chance else (low, middle)
    return high


@pytest.mark.parametrize("order", ["shuffled", "rising"])
@pytest.mark.parametrize("name", [*ERRORS, *EXCESS])
def test_bound_covers(name, order):
    errors = population({**ERRORS, **EXCESS}[name]).clamp(max=1)
    # rising errors: strata whose means differ as much as they can
    errors = errors.sort().values if order == "rising" else errors
    bound = mean_bound(samples(errors, ROWS)[0], CHANCE)
    assert len(bound) >= 200
    assert (bound >= errors.mean()).double().mean() >= 1 - CHANCE


@pytest.mark.parametrize("name", ["lognormal 1", "0.5% wholly wrong", "2% wholly wrong", "10% wholly wrong"])
def test_bound_covers_at_every_look_at_once(name):
    errors = population(ERRORS[name]).clamp(max=1)
    batches = [samples(errors, rows)[0] for rows in (60, 61, 120)]
    looks = [mean_bound(torch.cat(batches[: look + 1], -1), CHANCE) for look in range(3)]
    least = torch.stack(looks).amin(0)
    assert (least >= errors.mean()).double().mean() >= 1 - CHANCE
    assert looks[2].median() < looks[0].median()


@pytest.mark.parametrize("name", EXCESS)
def test_what_exceeds_wholly_wrong_is_added(name):
    errors = population(EXCESS[name])
    drawn = samples(errors, ROWS)[0]
    bound = mean_bound(drawn, CHANCE)
    assert (bound >= errors.mean()).double().mean() >= 0.90
    # nothing is lost by the split: the same rows, cut to wholly wrong, are bounded by just so much less
    excess = (drawn - 1).clamp(min=0).mean(-1)
    assert excess.max() > 0
    assert_exact(bound - mean_bound(drawn.clamp(max=1), CHANCE), excess, size=1.0)


@pytest.mark.parametrize("name", ["lognormal 1", "2% wholly wrong"])
def test_the_mean_alone_does_not_cover(name):
    # the twin of the test above
    errors = population(ERRORS[name])
    assert (samples(errors, ROWS)[0].mean(-1) >= errors.mean()).double().mean() < 0.7


@pytest.mark.parametrize("chance", [0.05, 0.01, 1e-4])
@pytest.mark.parametrize("wrong", [0, 1, 3, 13, 40])
def test_bound_of_two_valued_errors_is_little_above_the_tightest(wrong, chance):
    errors = torch.zeros(ROWS, dtype=torch.float64)
    errors[:wrong] = 1
    bound, tightest = mean_bound(errors, chance).item(), clopper_pearson(wrong, ROWS, chance)
    # the price of four bets in place of the best one, known only afterwards: highest where one row alone is wrong
    assert tightest <= bound <= 1.6 * tightest
    if not wrong:
        assert bound <= 1 - (0.4 * chance) ** (1 / ROWS)


def test_rows_that_hide_nothing_are_bounded_within_what_rows_not_seen_may_hide():
    errors = population(ERRORS["lognormal 0.5"])
    bound = mean_bound(samples(errors, ROWS)[0], CHANCE)
    assert bound.median() - errors.mean() <= 1.2 * -math.log(0.4 * CHANCE) / ROWS


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_errors_that_are_no_numbers_are_never_certified(bad):
    errors = torch.zeros(2, 1, ROWS)
    errors[1, 0, 7] = bad
    aim = Aim(0.5, CHANCE, ROWS, torch.ones(1, 1))
    assert aim.certificate(errors).bound[0] <= 0.5
    assert aim.certificate(errors).bound[1] == torch.inf
    # nor if rows seen before were fine
    assert aim.certificate(errors, aim.certificate(torch.zeros(2, 1, 7))).bound[1] == torch.inf
    assert mean_bound(errors, CHANCE)[1] == torch.inf
    assert aim.foresee(errors, ROWS).tolist() == [[True], [False]]


def test_what_is_foreseen_is_what_is_certified():
    drawn = samples(population(ERRORS["lognormal 1"]), ROWS)[0][:, None]
    aim = Aim(0.135, CHANCE, ROWS, torch.ones(1, 1))
    certified = aim.certificate(drawn).bound <= aim.tolerance
    assert certified.any()
    assert not certified.all()
    assert torch.equal(aim.foresee(drawn, ROWS), certified)


def test_rows_that_see_nothing_do_not_dilute_the_mean():
    errors = samples(population(ERRORS["lognormal 1"]), ROWS)[0][:, None]
    half = torch.cat([errors, torch.zeros_like(errors)], -1)
    alone = Aim(0.5, CHANCE, ROWS, torch.ones(1, 1)).certificate(errors).bound
    aim = Aim(0.135, CHANCE, 2 * ROWS, torch.full((1, 1), 0.5))
    assert (aim.certificate(half).bound >= 0.98 * alone).all()
    # twice the rows, half of which see nothing, tell as much as the rows that see something alone
    assert not aim.foresee(half, 2 * ROWS)[alone > 1.02 * aim.tolerance].any()
    assert (alone > 1.02 * aim.tolerance).any()


@pytest.mark.parametrize("huge", [0.0, 50.0], ids=["at most wholly wrong", "huge"])
def test_a_head_once_certified_stays_so_while_others_are_looked_at_again(monkeypatch, huge):
    aim, rows = Aim(0.2, CHANCE, 10**6, torch.ones(1, 1)), 60
    looks = [torch.zeros(1, 2, 30), torch.zeros(1, 2, 30), torch.zeros(1, 2, 60)]
    for look in looks:
        # the other head needs all looks; this one errs in the later ones only
        look[:, 1] = 0.165
    looks[1][:, 0, :12], looks[2][:, 0, :12] = 1.0, 1.0
    looks[2][:, 0, 0] += huge
    left = iter(looks)
    monkeypatch.setattr(certificate, "row_errors", lambda *_: next(left))
    some = problem(128, heads=2, kv_heads=2)
    given = certify(some, some.q, aim, rows, 0)
    assert given.errors.shape == (1, 2, 120)
    assert mean_bound(given.errors.clamp(max=1), CHANCE)[0, 0] > 0.2
    assert_exact(given.bounded[0, 0], mean_bound(looks[0][0, 0], CHANCE), size=1.0)
    assert given.bounded[0, 0] <= 0.2
    # what exceeds wholly wrong is no bet: once seen, it counts
    assert_exact(given.excess[0, 0], torch.tensor(huge / 120, dtype=torch.float64), size=1.0)
    assert bool(given.bound[0, 0] <= 0.2) == (huge == 0)


def test_capital_rises_with_the_mean_bet_against():
    errors = samples(population(ERRORS["10% wholly wrong"]), ROWS)[0][0]
    capital = torch.stack([log_capital(errors, torch.tensor(m)) for m in (-0.1, 0.0, 0.1, 0.3, 0.9, 1.0)])
    assert (capital.diff() > 0).all()
    assert capital[0] == -torch.inf
    assert capital[-1] == torch.inf


def test_more_rows_where_tolerance_or_confidence_ask_for_them():
    def rows(tolerance, chance, pairs, queries=10**6, live=((1.0,),)):
        return Aim(tolerance, chance, queries, torch.tensor(live)).rows(pairs)

    assert rows(0.01, 0.01, 1000) > 5 * rows(0.1, 0.01, 1000)
    assert rows(0.1, 0.0001, 1000) > rows(0.1, 0.01, 1000)
    assert rows(0.1, 0.01, 8000) > rows(0.1, 0.01, 1000)
    assert rows(0.01, 0.01, 1000, queries=300) == 300
    # rows that see nothing tell nothing: the entry with the fewest others asks for more
    # (0.1 is no binary number, and rows are rounded up)
    assert rows(0.1, 0.01, 1000, live=((1.0,), (0.1,))) == pytest.approx(rows(0.01, 0.01, 1000), rel=0.01)
    assert rows(0.1, 0.01, 1000, queries=300, live=((0.001,),)) == 300


def test_every_attempt_and_the_pilot_draw_rows_of_their_own():
    whole = problem(4096, heads=1, kv_heads=1)
    pilot = take_pilot(whole, 16)
    assert pilot is not None
    piloted = pilot.problem.position[pilot.index]
    drawn = [fresh_rows(whole, 256, *which) for which in ((0, 0), (1, 0), (0, 1), (1, 1))]
    for rows, others in combinations([*drawn, piloted], 2):
        # 256 of 4096 rows by chance: 16 in common are expected
        assert torch.isin(rows, others).sum() < 48
    assert all((rows // 16 == torch.arange(256)).all() for rows in drawn)


def test_rows_are_as_many_as_their_cost_balances():
    aim = Aim(0.1, 0.001, 10**6, torch.tensor([[1.0], [0.5]]))
    # rows that a sample without a wrong one cannot exclude, over the entry where half of the rows see anything
    unseen = -math.log(0.001 * STAKES[0]) / (0.1 * 0.5)
    # the price of a row falls due at four fifths of them; below, three times as many as cannot be seen are the least
    assert aim.rows(10**5) == math.ceil(math.sqrt(0.8 * unseen * 10**5)) > math.ceil(3 * unseen)
    assert aim.rows(1) == math.ceil(3 * unseen)
    assert Aim(0.1, 0.001, 50, torch.ones(1, 1)).rows(10**5) == 50
