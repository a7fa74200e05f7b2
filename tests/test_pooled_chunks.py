"""Chunks that share a pool: unbiased, exact when the budget covers, the same whoever holds the tokens."""

import pytest
import torch

import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_unbiased
from hyperattention.compiled import write_method
from hyperattention.pooled.law import CERTAIN, NUM_SIZES, draw, histogram, replies
from problems import problem, tensors

LOCAL = ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(16), tile=16)
POOLED = ha.PooledChunks(LOCAL, chunk=48, num=20, averages=2, near=16, sinks=4)
both_masks = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


@pytest.mark.slow
@both_masks
def test_numerator_and_denominator_are_unbiased(causal):
    whole = problem(110, heads=2, kv_heads=1, causal=causal, dtype=torch.float64)
    exact = ha.Exact().attend(whole)
    found = []
    for seed in range(48):
        ours = POOLED.attend(problem(110, heads=2, kv_heads=1, causal=causal, dtype=torch.float64, seed=seed))
        share = (ours.lse - exact.lse).exp()[..., None]
        # a part of the rows of every chunk, so that the number of statistics is bounded
        found.append(torch.cat([share, share * ours.out - exact.out + 1], 3)[:, :, ::7])
    assert_unbiased(torch.stack(found), 1.0, largest_error=0.5, rounding=1e-9)


def test_a_budget_of_every_key_is_exact():
    q, k, v = tensors(150, heads=4, dtype=torch.float64)
    live = torch.arange(150)[None] % 7 > 0
    every = ha.PooledChunks(ha.Method(ha.Draw(200), tile=16), chunk=48, num=150, near=16, sinks=4)
    for causal in (True, False):
        options = {"is_causal": causal, "enable_gqa": True, "key_mask": live}
        assert_exact(ha.attention(q, k, v, method=every, **options), ha.attention(q, k, v, method=ha.Exact(), **options))


def test_gradients_are_those_of_exact_attention_when_every_key_is_listed():
    every = ha.PooledChunks(ha.Method(ha.Draw(200), tile=16), chunk=48, num=150, near=16, sinks=4)
    found = []
    for method in (every, ha.Exact()):
        q, k, v = (x.requires_grad_() for x in tensors(150, heads=4, dtype=torch.float64))
        ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=method).square().sum().backward()
        found.append((q.grad, k.grad, v.grad))
    for ours, exact in zip(*found, strict=True):
        assert_exact(ours, exact)


def _shares(lists: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    share = torch.randn(lists, keys, generator=torch.Generator().manual_seed(1)).mul(3).exp() * 1e-3
    share[:, :3] = CERTAIN
    eligible = torch.rand(lists, keys, generator=torch.Generator().manual_seed(2)) > 0.1
    return share.masked_fill(~eligible, 0.0), eligible


def _of_owners(parts: list[slice], share: torch.Tensor, eligible: torch.Tensor, noise: torch.Tensor) -> list[list]:
    """Draw as several owners; the slot, key and chance of every point of each list."""
    told = replies(torch.stack([histogram(share[:, p], eligible[:, p]) for p in parts], 1), 40, 0.1, noise)
    found: list[list] = [[] for _ in noise]
    for number, part in enumerate(parts):
        drawn = draw(share[:, part], eligible[:, part], told[:, number], noise)
        for one, points in enumerate(drawn.points.tolist()):
            index, chance = (drawn.index + part.start)[one, :points].tolist(), drawn.chance[one, :points]
            assert (chance > 0).all()
            slots = range(int(drawn.first[one]), int(drawn.first[one]) + points)
            found[one] += zip(slots, index, chance.tolist(), strict=True)
    return found


def test_owners_draw_what_one_owner_draws():
    share, eligible = _shares(3, 500)
    noise = torch.tensor([0.0, 0.3, 0.999], dtype=torch.float64)
    one = _of_owners([slice(0, 500)], share, eligible, noise)
    several = _of_owners([slice(0, 7), slice(7, 300), slice(300, 301), slice(301, 500)], share, eligible, noise)
    for ours, expected in zip(several, one, strict=True):
        assert [x[:2] for x in ours] == [x[:2] for x in expected]
        assert [x[2] for x in ours] == pytest.approx([x[2] for x in expected])
        # as many slots as the pool has, in order, and the keys of the largest shares among them
        assert [x[0] for x in expected] == list(range(40))
        assert {key for key in range(3) if eligible[0, key]} <= {x[1] for x in one[0]}


@pytest.mark.parametrize("keys", [0, 1, 39, 40, 41, 45])
def test_about_as_many_keys_as_slots(keys):
    share = torch.full((1, 64), 0.01)
    eligible = (torch.arange(64) < keys)[None]
    noise = torch.tensor([0.5], dtype=torch.float64)
    (found,) = _of_owners([slice(0, 30), slice(30, 64)], share, eligible, noise)
    assert len(found) <= 40
    assert {x[1] for x in found} <= set(range(keys))
    if keys <= 40:
        assert [x[1] for x in found] == list(range(keys))
        assert all(x[2] == 1.0 for x in found)
    assert histogram(share, eligible)[0, :NUM_SIZES].sum() == keys


def test_masked_keys_change_nothing_and_sinks_are_the_first_live_keys():
    q, k, v = tensors(150, heads=4, batch=2)
    live = torch.ones(2, 150, dtype=torch.bool)
    live[0, :30] = live[1, 50:60] = False
    found = []
    for hole in (0.0, torch.nan):
        k, v = (x.masked_fill(~live[:, None, :, None], hole) for x in (k, v))
        found.append(ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=POOLED, key_mask=live))
    assert_same_bits(*found)


def test_cost_and_description():
    pooled = ha.PooledChunks(chunk=4096, num=1024)
    assert pooled.cost(131_072).pairs == pooled.cost(8 * 131_072).pairs == pooled.local.cost(4096).pairs + 1024
    assert pooled.cost(4096).pairs == pooled.local.cost(4096).pairs
    assert pooled.complete
    assert not ha.PooledChunks(ha.Method(ha.Window(16)), near=64).complete
    assert pooled.looks_ahead == ha.LookAhead.SEQUENCE
    assert '"type":"PooledChunks"' in write_method(pooled).replace(" ", "")
    q, k, v = tensors(150)
    with pytest.raises(NotImplementedError, match="standard error"):
        ha.measured_attention(q, k, v, method=POOLED, standard_error=True)
