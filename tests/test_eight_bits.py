"""Scores in 8-bit integers choose about as well as float scores, however the sizes of keys differ."""

from dataclasses import replace

import pytest
import torch

import hyperattention as ha
from assertions import assert_same_bits
from dense import reference
from hyperattention.problem import Problem
from hyperattention.select.score import scan
from hyperattention.select.score.eight_bits import EightBitKeys, rounded_queries
from hyperattention.select.stage import Stage

FIRST, LENGTH = 64, 512
STAGES = {
    "scan": ha.Draw(FIRST, by=ha.KeyScan(16)),
}
SIZES = {
    "later keys larger": (0.01, 1.0),
    "later keys a little larger": (0.1, 1.0),
    "later keys smaller": (100.0, 1.0),
    "first keys zero": (0.0, 1.0),
    "all keys tiny": (1e-12, 1e-12),
}


def grown(first: float, later: float) -> Problem:
    """Keys of two sizes: scores of the later ones have a deviation of three."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, LENGTH, 16, generator=generator) for _ in range(3))
    k[:, :, :FIRST] *= first
    k[:, :, FIRST:] *= later
    return Problem(q * (3 / later), k, v, 16**-0.5, causal=True)


def set_integers(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(scan, "integers_are_fast", lambda x: fast)
    monkeypatch.setattr(scan, "for_estimates", lambda x: x)


def error_of(method: ha.Method, given: Problem) -> float:
    truth = reference(given.q, given.k, given.v, causal=True, scale=given.scale)[0]
    total = sum((method.attend(replace(given, seed=seed)).out - truth).square().sum() for seed in range(3))
    return float(total / truth.square().sum()) ** 0.5


def assert_chosen_as_well(monkeypatch: pytest.MonkeyPatch, stage: Stage, given: Problem) -> None:
    method, error = ha.Method(ha.Sinks(4), ha.Window(16), stage, tile=32), {}
    for fast in (True, False):
        set_integers(monkeypatch, fast)
        error[fast] = error_of(method, given)
    assert error[True] < 1.3 * error[False]


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_error_is_about_that_of_float_scores(monkeypatch, sizes, stage):
    assert_chosen_as_well(monkeypatch, stage, grown(*sizes))


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_one_large_key_among_the_first_does_not_hide_the_others(monkeypatch, stage):
    given = grown(1.0, 1.0)
    given.k[:, :, 3] *= 100
    assert_chosen_as_well(monkeypatch, stage, given)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_what_a_tile_draws_does_not_depend_on_larger_keys_after_it(monkeypatch, stage):
    set_integers(monkeypatch, True)
    given, method = grown(1.0, 1.0), ha.Method(ha.Sinks(4), ha.Window(16), stage, tile=32)
    until = 384
    larger = replace(given, k=torch.cat([given.k[:, :, :until], 100 * given.k[:, :, until:]], 2))
    (a, b) = (method.attend(x).out for x in (given, larger))
    assert_same_bits(a[:, :, :until], b[:, :, :until])
    assert not torch.equal(a[:, :, until + 32 :], b[:, :, until + 32 :])


def test_ordinary_keys_stay_in_integers():
    given = grown(1.0, 1.0)
    keys = given.k.flatten(0, 1)
    rounded = EightBitKeys.of(keys, keys[:, :FIRST])
    assert (rounded.fit == LENGTH).all()
    scaled = given.q[0, 0, :, None] * given.scale * rounded.step[0]
    assert rounded.precise(0, scaled, torch.full((LENGTH,), LENGTH)).all()


def test_a_tile_needs_floats_from_the_first_key_out_of_range_on():
    keys = torch.randn(2, 100, 4, generator=torch.Generator().manual_seed(0))
    keys[1, 70, 2] = 1000.0
    rounded = EightBitKeys.of(keys, keys[:, :20])
    assert rounded.fit.tolist() == [100, 70]
    still = torch.zeros(3, 1, 4)
    assert rounded.precise(1, still, torch.tensor([69, 70, 71])).tolist() == [True, True, False]
    assert rounded.precise(0, still + 1e6, torch.tensor([1, 1, 1])).tolist() == [False] * 3


def test_queries_of_zeros_have_a_normal_unit():
    rounded, unit = rounded_queries(torch.zeros(3, 2, 4))
    assert not rounded.any()
    assert (unit >= torch.finfo(torch.float32).tiny).all()
