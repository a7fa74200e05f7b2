"""The interval of the audit covers, on heavy tails too, and is narrow enough to say something."""

import math
from functools import cache

import pytest
import torch

from assertions import assert_same_bits
from hyperattention.error.audit import sample_rows
from hyperattention.error.interval import _least_ranks, mean_interval, percentile_bound

POPULATION = 16384
CASES = 400  # samples drawn from each population of row errors


def population(draw):
    return draw(torch.Generator().manual_seed(7), POPULATION).double()


def lognormal(mean, sigma):
    return lambda g, n: mean * torch.exp(sigma * torch.randn(n, generator=g) - sigma**2 / 2)


def gamma_half(mean):
    return lambda g, n: mean * torch.randn(n, generator=g).square()


def uniform(mean):
    return lambda g, n: 2 * mean * torch.rand(n, generator=g)


def constant(mean):
    return lambda g, n: mean + 1e-4 * mean * torch.randn(n, generator=g)


def missed(share, wrong=lambda g, n: 1 + 0.1 * torch.randn(n, generator=g), bulk=0.01):
    """Tiny errors everywhere but in a share of rows that are wholly wrong, as a missed needle leaves them."""

    def draw(g, n):
        errors = lognormal(bulk, 0.5)(g, n)
        rows = torch.randperm(n, generator=g)[: round(share * n)]
        errors[rows] = wrong(g, len(rows))
        return errors

    return draw


ORDINARY = {
    "lognormal 0.5": lognormal(0.1, 0.5),
    "lognormal 1": lognormal(0.1, 1.0),
    "lognormal 1, small": lognormal(0.02, 1.0),
    "gamma 0.5": gamma_half(0.1),
    "uniform": uniform(0.1),
    "constant": constant(0.05),
    "constant, small": constant(0.02),
}
HEAVY = {
    "0.5% missed": missed(0.005),
    "1% missed": missed(0.01),
    "2% missed": missed(0.02),
    "5% missed": missed(0.05),
    "2% half to one and a half wrong": missed(0.02, lambda g, n: 0.5 + torch.rand(n, generator=g)),
    "1% missed among errors of 0.1": missed(0.01, bulk=0.1),
    "10% a tenth wrong": missed(0.1, lambda g, n: 0.1 * torch.rand(n, generator=g)),
}


@cache
def strata(rows):
    return torch.stack([sample_rows(POPULATION, rows, seed, "cpu") for seed in range(CASES)])


def samples(errors, rows):
    return errors[strata(rows)][None]


def every(rows, batch=1):
    return torch.ones(batch, rows, dtype=torch.bool)


def cover(low, high, truth):
    return ((low <= truth) & (truth <= high)).double().mean().item()


@pytest.mark.parametrize("rows", [64, 256])
@pytest.mark.parametrize("name", [*ORDINARY, *HEAVY])
def test_interval_covers(name, rows):
    errors = population({**ORDINARY, **HEAVY}[name])
    low, high = mean_interval(samples(errors, rows), every(rows))
    # 400 cases: a standard error of 0.015 at 0.90, which the interval, nominally 0.95, stays clear of
    assert cover(low, high, errors.mean()) >= 0.90
    assert (low <= high).all()


def test_a_normal_interval_fails_where_ours_covers():
    # the twin of the test above: a few wholly wrong rows that most samples of 64 miss
    errors = population(HEAVY["2% missed"])
    drawn = samples(errors, 64)
    half = 1.96 * drawn.std(-1) / math.sqrt(64)
    assert cover(drawn.mean(-1) - half, drawn.mean(-1) + half, errors.mean()) < 0.80


@pytest.mark.parametrize("name", [*ORDINARY, "5% missed", "1% missed among errors of 0.1"])
def test_half_width_at_256_rows(name):
    # not demanded of 0.5% to 2% missed among errors of 0.01: 256 rows hold too few of them for any 95% interval
    errors = population({**ORDINARY, **HEAVY}[name])
    low, high = mean_interval(samples(errors, 256), every(256))
    assert (high - low).median() / 2 <= 0.5 * errors.mean()


def binomial_cdf(count, trials, p):
    return sum(math.comb(trials, j) * p**j * (1 - p) ** (trials - j) for j in range(count + 1))


@pytest.mark.parametrize("rows", [64, 256])
@pytest.mark.parametrize("wrong", [0, 1, 3, 13])
def test_two_valued_errors_give_the_clopper_pearson_interval(rows, wrong):
    errors = torch.zeros(1, 1, rows, dtype=torch.float64)
    errors[..., :wrong] = 1
    low, high = (end.item() for end in mean_interval(errors, every(rows)))
    # 2048 resamples place a tail of 2.5% within 0.35%, one standard error
    assert abs(binomial_cdf(wrong, rows, high) - 0.025) <= 3 * 0.0035
    if wrong:
        assert abs(1 - binomial_cdf(wrong - 1, rows, low) - 0.025) <= 3 * 0.0035
    else:
        assert low == 0


def test_dead_rows_count_for_nothing():
    errors = population(lognormal(0.1, 1.0))[:64][None, None]
    live = torch.arange(64)[None] % 3 > 0
    spoiled = errors.masked_fill(~live[:, None], torch.nan)
    assert_same_bits(torch.stack(mean_interval(spoiled, live)), torch.stack(mean_interval(errors, live)))
    low, high = mean_interval(errors, live)
    assert low < errors[:, live].mean() < high
    assert all(end.isnan().all() for end in mean_interval(errors, live & False))


@pytest.mark.parametrize("name", ["lognormal 1", "5% missed"])
@pytest.mark.parametrize("rows", [59, 64, 256])
def test_percentile_bound_holds_and_is_one_of_the_rows(name, rows):
    errors = population({**ORDINARY, **HEAVY}[name])
    drawn = samples(errors, rows)
    bound = percentile_bound(drawn, every(rows))
    truth = errors.kthvalue(math.ceil(0.95 * len(errors))).values
    # 95% nominal, within 4.5 standard errors of 400 cases
    assert (bound >= truth).double().mean() >= 0.95 - 4.5 * math.sqrt(0.95 * 0.05 / CASES)
    assert (drawn == bound[..., None]).any(-1).all()


def test_percentile_bound_needs_59_rows():
    errors = torch.rand(1, 2, 64, generator=torch.Generator().manual_seed(0))
    assert percentile_bound(errors[..., :58], every(58)).isnan().all()
    assert_same_bits(percentile_bound(errors[..., :59], every(59)), errors[..., :59].amax(-1))
    live = every(64)
    live[:, :6] = False
    assert percentile_bound(errors, live).isnan().all()


@pytest.mark.parametrize("p", [0.95, 0.5])
def test_ranks_of_all_counts_are_the_least_of_each(p):
    ranks = _least_ranks(300, p)
    for count in (*range(90), 200, 300):
        rank = ranks[count]
        at_least = [1 - binomial_cdf(k - 1, count, p) for k in range(1, count + 1)]
        # where a chance is 5% to rounding either rank would do; none is
        assert rank == next((k for k, chance in enumerate(at_least, 1) if chance <= 0.05), 0)


def test_rows_that_count_differ_between_batch_entries():
    errors = torch.rand(2, 3, 100, generator=torch.Generator().manual_seed(0))
    live = torch.arange(100) < torch.tensor([[100], [59]])
    bound = percentile_bound(errors, live)
    assert_same_bits(bound[1], errors[1, :, :59].amax(-1))
    assert_same_bits(bound[0], percentile_bound(errors[:1], every(100))[0])
