"""Chunks that share a pool: unbiased, exact when the budget covers, the same whoever holds the tokens."""

from dataclasses import replace

import pytest
import torch

import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_unbiased
from hyperattention.compiled import write_method
from hyperattention.pooled.averages import packed, unpacked
from hyperattention.pooled.law import CERTAIN, NUM_SIZES, draw, histogram, replies
from hyperattention.pooled.layout import Cell, Grid
from hyperattention.pooled.pool import Near
from hyperattention.pooled.scores import near_sums
from problems import problem, tensors

LOCAL = ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(16), tile=16)
POOLED = ha.PooledChunks(LOCAL, chunk=48, num=20, averages=6, near=16, sinks=4)
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


def test_a_key_just_below_an_edge_is_certain_where_there_is_room_for_all():
    share = torch.full((1, 20), 0.5, dtype=torch.float64)
    share[0, 7] = 0.25 * (1 - 1e-9)
    noise = torch.tensor([0.5], dtype=torch.float64)
    (found,) = _of_owners([slice(0, 20)], share, torch.ones(1, 20, dtype=torch.bool), noise)
    assert [x[1:] for x in found] == [(key, 1.0) for key in range(20)]


def test_masked_keys_change_nothing_and_sinks_are_the_first_live_keys():
    q, k, v = tensors(150, heads=4, batch=2)
    live = torch.ones(2, 150, dtype=torch.bool)
    live[0, :30] = live[1, 50:60] = False
    found = []
    for hole in (0.0, torch.nan):
        k, v = (x.masked_fill(~live[:, None, :, None], hole) for x in (k, v))
        found.append(ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=POOLED, key_mask=live))
    assert_same_bits(*found)


def test_averages_travel_in_eight_bits():
    mean = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 7
    mean[0, 1], mean[1, 2, 3] = 0.0, 100.0
    log_rows = torch.tensor([-torch.inf, 0.5, -1.25, 0.0, 2.0], dtype=torch.float64).expand(2, -1)
    data = packed(mean, log_rows)
    assert data.shape == (2, 5, 24 + 4)
    found = unpacked(data, torch.float64)
    # three bits behind the first one, or a step of the smallest numbers; what is cut off if the unit was rounded down
    step = mean.abs().amax(2, keepdim=True) / 448 * 2**-9
    assert ((found[..., :-1] - mean).abs() <= mean.abs() / 16 + step).all()
    assert_same_bits(found[..., -1], log_rows.contiguous())
    # an odd width, where few numbers, or none, came
    for lists, count in ((1, 1), (2, 0), (2, 3)):
        few, none = mean[:lists, :count, :15], log_rows[:lists, :count]
        assert_same_bits(unpacked(packed(few, none), torch.float64)[..., -1], none.contiguous())


@both_masks
def test_a_query_that_looks_for_a_key_alone_is_not_hidden_by_an_average(causal):
    whole = problem(192, heads=2, kv_heads=1, causal=causal, dtype=torch.float64)
    # one query of the last chunk looks for one key of the first; all others look for little
    q, k, query = whole.q * 0.1, whole.k, 170
    q[:, 1, query] = 20 * k[:, 0, 21] / k[:, 0, 21].norm()
    # queries differ most where all keys are alike, and that changes no weight
    k[..., -1], q[..., -1] = 1.0, 1e3 * whole.q[..., -1]
    whole = replace(whole, q=q, k=k)
    pooled = ha.PooledChunks(ha.Method(ha.Draw(64), tile=16), chunk=64, num=12, averages=8, near=16, sinks=4, block=64)
    exact = ha.Exact().attend(whole).out[:, 1, query]

    def error(method: ha.PooledChunks) -> float:
        """The largest of eight pools, each with a slot for one key in ten."""
        found = [method.attend(replace(whole, seed=seed)).out[:, 1, query] for seed in range(8)]
        return max(float((out - exact).norm() / exact.norm()) for out in found)

    # the rest of the weight is estimated; without the key nearly all is lost
    assert error(pooled) < 0.1
    assert error(replace(pooled, averages=1)) > 0.5


def test_sums_over_keys_near_a_block_count_what_its_last_query_sees():
    grid = Grid(chunk=32, near=8, tile=16, num_keys=80, causal=True)
    cell, generator = Cell(0, 64, 80, 64), torch.Generator().manual_seed(4)
    k = torch.randn(2, 2, 24, 8, generator=generator, dtype=torch.float64)
    own = torch.randn(4, 3, 9, generator=generator, dtype=torch.float64)
    live = torch.rand(2, 24, generator=generator) > 0.3
    found = near_sums(Near(k, live), 0, cell, grid, own)
    score = (own[..., :-1] @ k.flatten(0, 1).mT).masked_fill(~live.repeat_interleave(2, 0)[:, None], -torch.inf)
    assert_exact(found, score.logsumexp(2))
    # a block that ends before the cell does not see what is behind it
    early = near_sums(Near(k, None), 0, Cell(0, 64, 80, 64), replace(grid, tile=8), own.repeat(1, 2, 1))
    assert_exact(early[:, :3], (own[..., :-1] @ k.flatten(0, 1)[:, :16].mT).logsumexp(2))


def test_cost_and_description():
    pooled = ha.PooledChunks(chunk=4096, num=1024)
    assert pooled.cost(131_072).pairs == pooled.cost(8 * 131_072).pairs == pooled.local.cost(4096).pairs + 1024
    assert pooled.cost(131_072).pairs == 2000.0
    assert pooled.cost(4096).pairs == pooled.local.cost(4096).pairs
    # 8 groups in each block of 64 positions, however many were asked for
    rounded = replace(POOLED, chunk=128, averages=9, block=64)
    assert rounded.cost(1024).selection_pairs == replace(rounded, averages=10).cost(1024).selection_pairs
    assert pooled.complete
    assert not ha.PooledChunks(ha.Method(ha.Window(16)), near=64).complete
    assert pooled.looks_ahead == ha.LookAhead.SEQUENCE
    assert '"type":"PooledChunks"' in write_method(pooled).replace(" ", "")
    q, k, v = tensors(150)
    with pytest.raises(NotImplementedError, match="standard error"):
        ha.measured_attention(q, k, v, method=POOLED, standard_error=True)
