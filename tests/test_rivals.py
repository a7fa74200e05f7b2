"""The rivals: what each chooses is what its paper says, and all are held to the same number of slots."""

import math

import pytest
import torch

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_math, assert_unbiased
from cases import RIVALS
from front_door import with_lse
from hyperattention import rivals, select
from hyperattention.bench.rivals import rivals as list_rivals
from hyperattention.problem import Problem
from hyperattention.rivals.collision_draw import twice
from hyperattention.sensitivity.leverage import leverage
from problems import problem, tensors
from run_case import both_masks, run


@pytest.mark.parametrize("slots", [512, 777, 1024, 4096])
def test_every_rival_keeps_to_the_slots(slots):
    rows = list_rivals(slots)
    assert len({row.name for row in rows}) == len({row.label for row in rows}) == len(rows) == 11
    for row in rows:
        assert slots - 16 < row.method.cost(10**6).pairs <= slots, row.name


@pytest.mark.parametrize("slots", [511, 0, True])
def test_too_few_slots_are_refused(slots):
    with pytest.raises(ValueError, match=f"rivals\\(slots={slots!r}\\)"):
        list_rivals(slots)


@pytest.mark.parametrize("row", list_rivals(512), ids=lambda row: row.name)
def test_a_rival_is_exact_where_its_slots_hold_all_keys_and_not_beyond(row):
    q, k, v = tensors(900, heads=4)
    for tokens, exact in ((150, True), (900, False)):
        x = [t[:, :, :tokens] for t in (q, k, v)]
        error = ha.audit(
            *x,
            ha.attention(*x, is_causal=True, enable_gqa=True, method=row.method),
            is_causal=True,
            enable_gqa=True,
            rows=tokens,
            hardness=False,
        ).relative_error
        assert (error.max() < 1e-5) == exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", RIVALS, ids=lambda case: case.name)
def test_other_precisions(case, dtype):
    q, k, v = tensors(case.exact_up_to, heads=4, dtype=dtype)
    ours, _ = run(case, q, k, v)
    assert_same_math(ours, *(f(q, k, v, causal=True)[0] for f in (dense.reference, dense.attention)))
    q, k, v = tensors(case.num_tokens, heads=4, dtype=dtype)
    assert torch.isfinite(run(case, q, k, v)[0]).all()


# the oracle


@both_masks
def test_top_keys_are_the_largest_scores_of_each_row(causal):
    q, k, v = tensors(40, 60, heads=4, batch=2)
    live = torch.ones(2, 60, dtype=torch.bool)
    live[0, 3:9], live[1, 50:] = False, False
    seen = (dense.visible(40, 60, causal=causal, align="lower_right") & live[:, None, None]).expand(2, 4, -1, -1)
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3)).masked_fill(~seen, -torch.inf)
    kept = torch.zeros_like(seen).scatter(3, scores.topk(7, dim=3)[1], True) & seen
    options = {"is_causal": causal, "causal_align": "lower_right"} if causal else {}
    ours = with_lse(q, k, v, method=rivals.TopKeys(7), enable_gqa=True, key_mask=live, **options)
    weight = kept.double()
    for x, y, z in zip(ours, *(f(q, k, v, weight=weight) for f in (dense.reference, dense.attention)), strict=True):
        assert_same_math(x, y, z)


def test_top_keys_of_some_queries():
    whole = problem(100, causal=True)
    few, method = whole.of_spans(16, 16, 32), rivals.TopKeys(7)
    assert_exact(method.attend(few).out, method.attend(whole).out[:, :, few.position])


@pytest.mark.parametrize("case", [case for case in RIVALS if isinstance(case.method, ha.Method)], ids=lambda case: case.name)
def test_heads_alone_choose_what_they_choose_among_all(case):
    whole = problem(150, heads=8, kv_heads=4)
    ours, all_heads = case.method.attend(whole.of_heads([3, 0])).out, case.method.attend(whole).out
    assert_exact(ours, all_heads.unflatten(1, (4, 2))[:, [3, 0]].flatten(1, 2))


# certain choices


@both_masks
@pytest.mark.parametrize("stride", [2, 4])
def test_anti_diagonals_written_out(causal, stride):
    asked, size, tile = problem(96, causal=causal, heads=2, kv_heads=1), 8, 16
    ours = ha.Method(rivals.AntiDiagonal(3, size, stride), tile=tile).select(asked)[1].runs[0].first[0] // size
    scores = asked.q[0] @ asked.k[0, 0].T * asked.scale  # [heads, queries, keys]
    for t in range(96 // tile):
        end = (t + 1) * tile if causal else 96
        mass = torch.zeros(end // size)
        for head in range(2):
            for g in range(t * tile, (t + 1) * tile, stride):
                stop = g + stride if causal else end
                sums = [sum(scores[head, g + stride - 1 - s, h + s] for s in range(stride)) for h in range(0, stop, stride)]
                for h, weight in enumerate(torch.softmax(torch.stack(sums) / stride, 0)):
                    mass[h * stride // size] += weight
        best = mass.topk(min(3, len(mass)))[1].sort()[0]
        assert ours[t, : len(best)].tolist() == best.tolist()


def test_sums_that_reach_past_a_tile_are_not_looked_at():
    q, k, v = tensors(80, heads=32, kv_heads=32)
    # one block that reaches past the tile is taken unseen, the other by its sums
    method = ha.Method(rivals.AntiDiagonal(2, block_size=8, stride=8), tile=20)
    before, after = (
        method.select(Problem(q, x, v, 0.3, causal=True))[1].runs[0].first[:, :3]
        for x in (k, k.index_fill(2, torch.arange(60, 64), torch.nan))
    )
    assert torch.equal(before, after)


def test_columns_and_diagonals_that_are_there_are_found():
    n, tile = 256, 16
    code = torch.randn(1, 1, n, 128, generator=torch.Generator().manual_seed(0)).sign()
    column = torch.randn(128, generator=torch.Generator().manual_seed(1)).sign()
    k = code.clone()
    k[0, 0, 37] = column
    # every query looks for one key, and a little more for the key five tiles before itself
    q = 1.05 * code.roll(5 * tile, 2) + column
    method = ha.Method(ha.Window(tile), rivals.VerticalSlash(1, 1, last=tile), tile=tile)
    _, selection = method.select(Problem(q, k, k, 0.2, causal=True))
    slash, vertical = selection.runs[-2:]
    assert slash.first[0, :, 0].tolist()[5:] == [tile * t for t in range(n // tile - 5)]
    assert (vertical.first == 37).all()
    # tile 7's run holds the column, tile 2 and its neighbour have it in their window
    taken = (vertical.log_weight[0, :, 0] == -torch.inf).nonzero()[:, 0].tolist()
    assert taken == [2, 3, 7]
    # a column that sinks hold is no column to be found, nor is its diagonal
    method = ha.Method(ha.Sinks(40), ha.Window(tile), rivals.VerticalSlash(1, 1, last=tile), tile=tile)
    vertical = method.select(Problem(q, k, k, 0.2, causal=True))[1].runs[-1]
    assert (vertical.first >= 40).all()


def test_leverage_is_that_of_the_centred_keys():
    k = tensors(50, head_dim=6, dtype=torch.float64)[1][0]
    ours = leverage(k, torch.tensor([[50], [30]]), 0.0, centred=True)
    for row, total in enumerate((50, 30)):
        x = k[row, :total] - k[row, :total].mean(0)
        assert_exact(ours[row, :total], (x @ torch.linalg.inv(x.T @ x) * x).sum(1), size=1e3)  # the least ridge is 1e-12
    assert (leverage(k, torch.tensor([[50], [30]]), 1e6, centred=True) < 1e-5).all()


def test_a_key_that_stands_out_is_in_the_set_of_every_tile():
    q, k, v = tensors(200)
    k[:, 1, 30] *= 20
    _, selection = ha.Method(select.UniversalSet(5), tile=16).select(Problem(q, k, v, 0.3, causal=True))
    first = selection.runs[0].first
    assert (first[1] == 30).any(-1).all()
    assert (first == first[:, :1]).all()
    _, selection = ha.Method(ha.Sinks(40), select.UniversalSet(5), tile=16).select(Problem(q, k, v, 0.3, causal=True))
    assert (selection.runs[-1].first >= 40).all()


# draws


def test_chance_of_two_collisions():
    p = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.01], dtype=torch.float64)
    for bits, tables in ((1, 2), (3, 7), (4, 40)):
        x = p**bits
        terms = [math.comb(tables, j) * x**j * (1 - x) ** (tables - j) for j in range(2, tables + 1)]
        assert_exact(twice(p, bits, tables), torch.stack(terms).sum(0))


def test_keys_towards_the_query_collide_more_often_and_weigh_less():
    q, k, v = tensors(400, heads=1, kv_heads=1)
    k[:, :, 100:200] = 3 + k[:, :, 100:200] / 4
    method = ha.Method(rivals.CollisionDraw(60, bits=4, tables=20), tile=400)
    runs = method.select(Problem(q + 3, k, v, 0.3))[1].runs[0]
    near = (runs.first >= 100) & (runs.first < 200)
    assert near.double().mean() > 0.25 + 0.1
    assert runs.log_weight[near].max() < runs.log_weight[~near].mean() - 0.1


def drawn(method, q, k) -> torch.Tensor:
    """Slots in use of every tile of a method's last stage."""
    runs = method.select(Problem(q, k, k, 0.3))[1].runs[-1]
    return (runs.log_weight > -torch.inf).sum(-1)


def test_as_many_draws_as_the_error_needs():
    q, k, _ = tensors(64, 3000)
    counts = [drawn(ha.Method(rivals.BudgetedDraw(1000, 50, epsilon)), q, k).double().mean() for epsilon in (0.5, 0.1, 0.05)]
    assert 50 <= counts[0] < counts[1] < counts[2] <= 1000
    # keys that are all alike need no more than the pilot; a single one beside sinks that hold all the weight neither
    assert (drawn(ha.Method(rivals.BudgetedDraw(1000, 50)), q, torch.ones_like(k)) == 50).all()
    heavy = k.clone()
    heavy[:, :, :4] = 5 * q[:, :, :1]
    sinks = ha.Method(ha.Sinks(4), rivals.BudgetedDraw(1000, 50, 0.1))
    assert (drawn(sinks, q[:, :, :1], heavy) == 50).all()


def test_the_error_of_the_denominator_is_the_one_asked_for():
    heads, epsilon, delta = 64, 0.03, 0.1
    q, k, v = (x.expand(-1, heads, -1, -1) for x in tensors(1, 3000, heads=1, kv_heads=1))
    k = k / 4
    method = ha.Method(rivals.BudgetedDraw(2000, 200, epsilon, delta))
    assert drawn(method, q, k).max() < 2000
    _, ours = with_lse(q, k, v, method=method)
    _, exact = with_lse(q, k, v, method=ha.Exact())
    inside = ((ours - exact).exp() - 1).abs() <= epsilon
    assert inside.double().mean() >= 1 - delta - 4.5 * math.sqrt(delta * (1 - delta) / heads)


def test_priorities_list_heavy_keys_once_and_others_at_the_threshold():
    heads, num = 400, 20
    q, k, v = (x.expand(-1, heads, -1, -1) for x in tensors(4, 300, heads=1, kv_heads=1))
    q = 2 * q
    runs = ha.Method(rivals.PriorityDraw(num, pooled=4), tile=4).select(Problem(q, k, v, 0.3))[1].runs[0]
    index, weight = runs.first[:, 0], runs.log_weight[:, 0].exp()
    assert all(len(set(row)) == num for row in index.tolist())
    mass = torch.softmax(q[0, 0] @ k[0, 0].T * 0.3, -1).amax(0)
    mass = 0.9 * mass / mass.sum() + 0.1 / 300
    share = mass[index] * weight
    light = weight > 1
    assert light.any()
    assert (~light).any()
    threshold = share.masked_fill(~light, torch.inf).amin(1, keepdim=True)
    assert_exact(share[light], threshold.expand_as(share)[light])
    assert (mass[index] >= threshold * (1 - 1e-5))[~light].all()
    # the heaviest key is never missed, and sums of weights are those of the keys
    assert (index == mass.argmax()).any(1).all()
    assert_unbiased(share.sum(1, keepdim=True), 1.0, largest_error=0.1)
