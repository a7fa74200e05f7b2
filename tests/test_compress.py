"""What every policy of a compressed cache must do, over every line of `policies.py`."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_bits, assert_unbiased
from hyperattention.cache.attended import attended
from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.policies.balanced_halving import BalancedHalving
from hyperattention.policies.heavy_hitters import HeavyHitters
from hyperattention.policies.last_window import LastWindow
from policies import POLICIES, PolicyCase

BEGIN, END, SLOTS, NUM, WIDTH = 4, 84, 96, 24, 8
each = pytest.mark.parametrize("case", POLICIES, ids=lambda case: case.name)


def held(batch: int = 2, heads: int = 2, *, dtype: torch.dtype = torch.float32, weighted: bool = True) -> CacheSlots:
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(batch, heads, SLOTS, WIDTH, generator=generator) for _ in range(2))
    weight = torch.rand(batch, heads, SLOTS, generator=generator) * 2 if weighted else torch.zeros(batch, heads, SLOTS)
    position = torch.arange(SLOTS, dtype=torch.int32).mul(3).expand(batch, heads, -1).contiguous()
    return CacheSlots(k.to(dtype), v.to(dtype), weight, position, torch.rand(batch, heads, SLOTS, generator=generator))


def full(slots: CacheSlots, policy: Policy, *, seed: int = 0, num: int = NUM) -> CompressionRequest:
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(1, 2 * slots.k.shape[1], policy.num_queries, WIDTH, generator=generator)
    queries = queries.expand(slots.k.shape[0], -1, -1, -1).to(slots.k.dtype)
    return CompressionRequest(slots, BEGIN, END, num, queries, WIDTH**-0.5, (seed, 1, 2))


def same(ours: CacheSlots, theirs: CacheSlots) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.tensors, theirs.tensors, strict=True))


def sums(kept: CacheSlots, q: Tensor) -> Tensor:
    """Numerator and denominator of attention, by head."""
    weight = kept.log_weight.double().exp() * (kept.k.double() @ q).exp()
    return torch.cat([weight.sum(-1, keepdim=True), (weight[..., None] * kept.v.double()).sum(2)], -1)


@each
def test_as_many_slots_come_back_as_there_is_room_for_in_order(case: PolicyCase) -> None:
    slots = held()
    before = CacheSlots(*(x.clone() for x in slots.tensors))
    kept = case.policy.compress(full(slots, case.policy))
    assert kept.num_slots == NUM
    assert bool(kept.live.all())
    assert [x.dtype for x in kept.tensors] == [x.dtype for x in slots.tensors]
    step = kept.position.diff(dim=-1)
    # mean positions of two clusters may round to one
    assert bool((step >= 0).all()) if case.averages else bool((step > 0).all())
    assert int(kept.position.min()) >= 3 * BEGIN
    assert int(kept.position.max()) < 3 * END
    # what was shown was only looked at
    assert same(slots, before)


@each
def test_an_empty_slot_comes_back_only_where_too_few_are_left(case: PolicyCase) -> None:
    slots = held()
    # garbage in empty slots is never read as a key
    dead = torch.zeros(2, 1, SLOTS, dtype=torch.bool)
    dead[0, :, BEGIN + 5 : BEGIN + 25] = True
    dead[1, :, BEGIN + 10 : END] = True
    log_weight = slots.log_weight.masked_fill(dead, -torch.inf)
    slots = replace(slots, log_weight=log_weight, k=slots.k.masked_fill(dead[..., None], 0.0))
    kept = case.policy.compress(full(slots, case.policy))
    live = kept.live.sum(-1)
    # a cluster may hold several of the few keys there are
    wanted = (live[0] == NUM) & (live[1] == 10)
    assert bool(wanted.all()) if not case.merges else bool((live[1] <= 10).all() & (live > 0).all())
    taken = kept.position[kept.live.logical_and(torch.tensor([True, False])[:, None, None])] // 3
    assert case.averages or not bool(dead[0, 0][taken].any())
    assert bool((kept.position[1][kept.live[1]] < 3 * (BEGIN + 10)).all())
    assert all(bool(x[kept.live].isfinite().all()) for x in (kept.k, kept.v, kept.log_weight))


@each
def test_the_same_counters_give_the_same_bits(case: PolicyCase) -> None:
    torch.manual_seed(0)
    ours = case.policy.compress(full(held(), case.policy))
    torch.manual_seed(1)
    assert same(ours, case.policy.compress(full(held(), case.policy)))


@each
def test_rows_and_heads_do_not_see_one_another(case: PolicyCase) -> None:
    slots = held()
    ours = case.policy.compress(full(slots, case.policy))
    alone = case.policy.compress(full(CacheSlots(*(x[1:] for x in slots.tensors)), case.policy))
    assert_same_bits(ours.position[1:], alone.position)
    assert_exact(ours.log_weight[1:], alone.log_weight)
    other = CacheSlots(*(x.clone() for x in slots.tensors))
    other.k[:, 0] += 1.0
    other.v[:, 0] *= 2.0
    other.score[:, 0] += torch.linspace(0, 1, SLOTS)
    moved = case.policy.compress(full(other, case.policy))
    assert_same_bits(ours.position[:, 1], moved.position[:, 1])
    assert_exact(ours.log_weight[:, 1], moved.log_weight[:, 1])


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keys_are_compressed(case: PolicyCase, dtype: torch.dtype) -> None:
    kept = case.policy.compress(full(held(dtype=dtype), case.policy))
    assert kept.k.dtype == kept.v.dtype == dtype
    assert all(bool(x.isfinite().all()) for x in kept.tensors)


@pytest.mark.parametrize("case", [case for case in POLICIES if case.keeps_total], ids=lambda case: case.name)
def test_total_weight_is_kept(case: PolicyCase) -> None:
    slots = full(held(weighted=not case.ignores_weights), case.policy)
    kept = case.policy.compress(slots)
    wanted = slots.candidates.log_weight.exp().sum(-1)
    assert_exact(kept.log_weight.exp().sum(-1), wanted)


@pytest.mark.parametrize("case", [case for case in POLICIES if case.unbiased], ids=lambda case: case.name)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_sums_over_keys_are_unbiased(case: PolicyCase, twice: bool) -> None:
    slots = held(1, 2, weighted=False)
    q = torch.randn(WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 0.5
    truth = sums(full(slots, case.policy).candidates, q)
    estimates = []
    for seed in range(400):
        kept = case.policy.compress(full(slots, case.policy, seed=seed, num=40 if twice else NUM))
        if twice:
            again = CompressionRequest(kept, 0, 40, NUM, torch.zeros(1, 4, 0, WIDTH), 1.0, (seed, 1, 3))
            kept = case.policy.compress(again)
        estimates.append(sums(kept, q))
    assert_unbiased(torch.stack(estimates), truth, largest_error=0.2 * truth.abs().amax().item())


def test_a_key_that_queries_look_at_is_kept() -> None:
    slots = held(1, 1)
    slots.score.zero_()
    slots.score[..., 37] = 1.0
    assert 3 * 37 in HeavyHitters().compress(full(slots, HeavyHitters())).position.tolist()[0][0]
    policy = LastWindow(8)
    asked = full(slots, policy)
    slots.k[0, 0, 37] = 20 * asked.queries[0, 0, -1]
    assert 3 * 37 in policy.compress(asked).position.tolist()[0][0]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_attention_is_summed_over_queries_causally(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(import_module("hyperattention.cache.attended"), "_SCORES_AT_A_TIME", rows * 2 * SLOTS)
    slots, q = held(1, 1), torch.randn(1, 2, 3, WIDTH, generator=torch.Generator().manual_seed(5))
    scores = (q.double() @ slots.k.double().transpose(2, 3)) * 0.3 + slots.log_weight.double()[:, :, None]
    limit = torch.arange(SLOTS - 2, SLOTS + 1)
    weights = scores.masked_fill(torch.arange(SLOTS) >= limit[:, None], -torch.inf).softmax(-1)
    assert_exact(attended(slots, q, 0.3), weights.sum((1, 2))[:, None])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pairs": 0}, "pairs=0.*positive integer"),
        ({"strength": -1.0}, "strength=-1.0.*not negative"),
        ({"strength": float("inf")}, "strength=inf.*finite"),
        ({"breadth": 0.0}, "breadth=0.0.*must be positive"),
        ({"breadth": -0.1}, "breadth=-0.1.*must be positive"),
        ({"breadth": float("nan")}, "breadth=nan.*must be positive"),
    ],
    ids=str,
)
def test_a_walk_that_is_none_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedHalving(**wrong)
