"""Draws by leverage: keys that stand out are drawn more often, and keys of leverage 0 count as often as they should."""

from dataclasses import replace

import pytest
import torch

import dense
import hyperattention as ha
from assertions import assert_unbiased
from hyperattention import select
from hyperattention.problem import Problem
from problems import problem

HEADS = 200


def with_keys_of_no_leverage(num: int) -> Problem:
    """Every other key is the mean key, 0; one key stands out."""
    asked = problem(num, causal=False, heads=1, kv_heads=1, head_dim=4)
    k = torch.zeros_like(asked.k)
    k[:, :, 1::4] = asked.k[:, :, 1::4]
    k[:, :, 3::4] = -k[:, :, 1::4]
    k[:, :, [1, 3]] *= 20
    # each head draws for itself
    q, k, v = (x.expand(-1, HEADS, -1, -1) for x in (asked.q, k, asked.v))
    return replace(asked, q=q, k=k, v=v)


@pytest.mark.parametrize("online", [False, True])
def test_keys_of_leverage_zero_have_an_expected_weight_of_one(online):
    asked, method = with_keys_of_no_leverage(40), ha.Method(ha.Draw(12, by=select.LeverageScore(online=online)), tile=40)
    weight = torch.cat([dense.weights(method, replace(asked, seed=seed))[0, :, 0] for seed in range(2)])
    # a key of leverage 0 is drawn by the uniform share alone: 12 * 0.3 / 40 times
    assert_unbiased(weight, 1.0, largest_error=1.2 * (1 / (12 * 0.3 / 40)) ** 0.5 / 20)
    drawn = (weight > 0).double().mean(0)
    assert drawn[1] > 2 * drawn[0::2].mean()
    if not online:
        # which scores both keys of a pair alike
        assert drawn[3] > 2 * drawn[0::2].mean()


@pytest.mark.parametrize("mix", [0.0, -0.1, 1.5, float("nan")])
def test_a_uniform_share_is_needed(mix):
    with pytest.raises(ValueError, match=f"LeverageScore\\(mix={mix!r}\\): mix must be above 0 and at most 1"):
        select.LeverageScore(mix=mix)


def test_ridges_that_do_not_fit():
    with pytest.raises(ValueError, match=r"ridge=-1.0\): it must not be negative"):
        select.LeverageScore(ridge=-1.0)
    with pytest.raises(ValueError, match=r"ridge=0.0\): it must not be negative, and must be positive with online"):
        select.LeverageScore(ridge=0.0, online=True)
    assert select.LeverageScore(ridge=0.0).looks_ahead == ha.LookAhead.SEQUENCE
    assert select.LeverageScore(online=True).looks_ahead == ha.LookAhead.TILE
