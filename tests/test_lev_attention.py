"""LevAttention: the set that it takes, the rows over that set, masks, groups, gradients, and bad values."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hyperattention as ha
from assertions import assert_exact, assert_same_bits
from front_door import with_lse
from hyperattention import sensitivity
from hyperattention.compiled import is_opaque, write_method
from hyperattention.methods import lev_attention
from problems import problem, tensors
from run_case import both_masks

TAKES = {
    "p=1": ha.LevAttention(9, p=1),
    "p=2": ha.LevAttention(9),
    "p=4": ha.LevAttention(9, p=4),
    "online": ha.LevAttention(9, online=True),
}
every_take = pytest.mark.parametrize("method", TAKES.values(), ids=TAKES)


def dense(
    q: Tensor, k: Tensor, v: Tensor, power: float, *, kept: Tensor | None = None, causal: bool = False, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Attention with weights |scale q . k|^p written out; `kept` says which pairs count."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    weight = (scale * q @ k.mT).abs() ** power
    weight = weight.tril() if causal else weight
    weight = weight if kept is None else weight * kept
    total = weight.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return weight @ v / total, total.log().masked_fill(empty, -torch.inf).squeeze(-1)


def wide(num: int, **shape) -> tuple[Tensor, Tensor, Tensor]:
    return tensors(num, heads=4, kv_heads=2, dtype=torch.float64, **shape)


def running(score: Tensor, num: int) -> Tensor:
    """Which keys are among the `num` largest of the first i + 1, for every i: ``[keys, keys]``."""
    kept = torch.zeros(len(score), len(score), dtype=torch.bool)
    for i in range(len(score)):
        kept[i, score[: i + 1].topk(min(num, i + 1))[1]] = True
    return kept


@both_masks
@pytest.mark.parametrize("power", [1, 1.5, 2, 3, 4, 6])
def test_all_keys_are_attention_by_powers(causal, power):
    q, k, v = wide(50)
    ours = with_lse(q, k, v, is_causal=causal, enable_gqa=True, method=ha.LevAttention(50, p=power), scale=0.3)
    # powers of sums of products: a few times the rounding of the sums
    for x, y in zip(ours, dense(q, k, v, power, causal=causal, scale=0.3), strict=True):
        assert_exact(x, y)


@both_masks
@pytest.mark.parametrize("power", [1, 2, 4])
def test_rows_are_over_the_keys_of_largest_sensitivity(causal, power):
    q, k, v = wide(60, batch=2)
    score = sensitivity.sensitivity_bounds(k.flatten(0, 1), power=power)
    kept = torch.zeros(4, 60, dtype=torch.bool).scatter(1, score.topk(9)[1], True)
    kept = kept.view(2, 2, 1, 60).repeat_interleave(2, 1)
    ours = with_lse(q, k, v, is_causal=causal, enable_gqa=True, method=ha.LevAttention(9, p=power), scale=1.0)
    for x, y in zip(ours, dense(q, k, v, power, kept=kept, causal=causal), strict=True):
        assert_exact(x, y)
    # the first rows may see no key of the set
    assert ((ours[1] == -torch.inf).any() and (ours[0] == 0).all(-1).any()) == causal


@pytest.mark.parametrize("num", [1, 9, 200])
def test_online_rows_are_over_the_largest_scores_so_far(num):
    # several tiles of keys, and rows in several chunks
    q, k, v = tensors(300, heads=2, kv_heads=1, dtype=torch.float64)
    kept = running(sensitivity.online_leverage(k[0])[0], num)
    ours = with_lse(q, k, v, is_causal=True, enable_gqa=True, method=ha.LevAttention(num, online=True), scale=1.0)
    for x, y in zip(ours, dense(q, k, v, 2, kept=kept, causal=True), strict=True):
        assert_exact(x, y)


def test_a_threshold_takes_as_many_keys_as_there_are():
    q, k, v = wide(60)
    for epsilon in (0.9999, 0.2, 0.05):
        score = sensitivity.leverage(k[0])
        kept = (score >= epsilon)[None, :, None].repeat_interleave(2, 1)
        ours, _ = with_lse(q, k, v, enable_gqa=True, method=ha.LevAttention(epsilon=epsilon), scale=1.0)
        assert_exact(ours, dense(q, k, v, 2, kept=kept)[0])
    # no key reaches the first, some but not all the last
    assert score.max() < 0.9999
    assert 0 < kept.double().mean() < 1


@every_take
@both_masks
def test_masked_keys_have_no_influence(method, causal):
    q, k, v = tensors(150, batch=2, dtype=torch.float64)
    live = torch.ones(2, 150, dtype=torch.bool)
    live[0, -30:], live[1, :21], live[1, 40:45] = False, False, False
    before = with_lse(q, k, v, method=method, is_causal=causal, key_mask=live)
    for poison in (100.0, torch.nan):
        other = [x.masked_fill(~live[:, None, :, None], poison) for x in (k, v)]
        for x, y in zip(with_lse(q, *other, method=method, is_causal=causal, key_mask=live), before, strict=True):
            assert_same_bits(x, y)
    # as if the other keys did not exist
    alone = with_lse(q[1:, :, live[1]], k[1:, :, live[1]], v[1:, :, live[1]], method=method, is_causal=causal)
    for x, y in zip(before, alone, strict=True):
        assert_exact(x[1:, :, live[1]], y, size=1e3)


@every_take
def test_a_group_of_equal_heads_is_one_head_and_batch_rows_are_independent(method):
    q, k, v = tensors(150, batch=2)
    before = with_lse(q, k, v, method=method, is_causal=True)
    grouped = with_lse(q.repeat_interleave(3, 1), k, v, method=method, is_causal=True, enable_gqa=True)
    other = with_lse(*(torch.cat([x[:1], -x[1:].flip(2)]) for x in (q, k, v)), method=method, is_causal=True)
    for x, y, z in zip(grouped, before, other, strict=True):
        assert_exact(x, y.repeat_interleave(3, 1))
        assert_same_bits(z[0], y[0])


@pytest.mark.parametrize("padding", [0, 10])
def test_online_rows_do_not_depend_on_later_tokens(padding):
    method = ha.LevAttention(9, online=True)
    assert method.looks_ahead == ha.LookAhead.NOTHING
    assert ha.LevAttention(9).looks_ahead == ha.LookAhead.SEQUENCE
    q, k, v = tensors(300)
    options = {"key_mask": torch.arange(300)[None] >= padding} if padding else {}
    before = with_lse(q, k, v, method=method, is_causal=True, **options)
    for last in (40, 127, 128, 200, 298):
        # more than a change of sign, which weights |q . k|^2 would not see
        other = [torch.cat([x[:, :, : last + 1], 1 - x[:, :, last + 1 :].flip(2)], 2) for x in (q, k, v)]
        after = with_lse(*other, method=method, is_causal=True, **options)
        for x, y in zip(after, before, strict=True):
            assert_same_bits(x[:, :, : last + 1], y[:, :, : last + 1])
        assert not torch.equal(after[0], before[0])


def test_online_rows_of_a_prompt_in_chunks_and_of_some_spans():
    method, whole = ha.LevAttention(9, online=True), problem(300, heads=4, kv_heads=2)
    out = method.attend(whole).out
    chunks = [
        method.attend(replace(whole, q=whole.q[:, :, a:b], k=whole.k[:, :, :b], v=whole.v[:, :, :b], offset=a)).out
        for a, b in ((0, 70), (70, 71), (71, 300))
    ]
    assert_exact(torch.cat(chunks, 2), out)
    for length, step in ((16, 32), (40, 150), (130, 140)):
        some = whole.of_spans(3, length, step)
        assert_exact(method.attend(some).out, out[:, :, some.position])
    some = whole.of_spans(3, 16, 32)
    assert_exact(ha.LevAttention(9).attend(some).out, ha.LevAttention(9).attend(whole).out[:, :, some.position])


@every_take
@both_masks
def test_chunks_of_rows_change_nothing(method, causal, monkeypatch):
    asked = problem(150, causal=causal, heads=4, kv_heads=2)
    results = []
    for scores, tile in ((2**22, 128), (2000, 32)):
        monkeypatch.setattr(lev_attention, "_SCORES", scores)
        monkeypatch.setattr(lev_attention, "_TILE", tile)
        leaves = [x.clone().requires_grad_() for x in (asked.q, asked.k, asked.v)]
        partial = method.attend(replace(asked, q=leaves[0], k=leaves[1], v=leaves[2]))
        loss = partial.out.square().sum() + partial.lse[partial.lse > -torch.inf].sum()
        results.append([partial.out, partial.lse, *torch.autograd.grad(loss, leaves)])
    for x, y in zip(*results, strict=True):
        assert_exact(x.detach(), y.detach())


@every_take
@both_masks
def test_gradients_are_those_with_the_set_held_fixed(method, causal):
    q, k, v = wide(40)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if method.online and causal:
        score = sensitivity.online_leverage(k[0])
        kept = torch.stack([running(each, 9) for each in score])[None].repeat_interleave(2, 1)
    else:
        chosen = method.universal_set(problem(40, causal=causal, heads=4, kv_heads=2, dtype=torch.float64))
        kept = torch.zeros(1, 2, 40, dtype=torch.bool).scatter(2, chosen, True)[:, :, None].repeat_interleave(2, 1)
    gradients = []
    for attend in (
        lambda *x: with_lse(*x, is_causal=causal, enable_gqa=True, method=method, scale=1.0),
        lambda *x: dense(*x, float(method.p), kept=kept, causal=causal),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves)
        loss = (out * weight).sum() + lse[lse > -torch.inf].square().sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for x, y in zip(*gradients, strict=True):
        assert torch.isfinite(x).all()
        # rows of few keys divide by small sums of powers
        assert_exact(x, y, size=1e3)


def test_a_row_whose_weights_are_all_zero_is_zero():
    q, k, v = tensors(20, dtype=torch.float64)
    q[:, :, 3] = 0
    k[..., 4:] = 0
    q[:, :, 5, :4] = 0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = with_lse(*leaves, method=ha.LevAttention(6))
    for row in (3, 5):
        assert (out[:, :, row] == 0).all()
        assert (lse[:, :, row] == -torch.inf).all()
    assert torch.isfinite(lse[:, :, :3]).all()
    for x in torch.autograd.grad(out.sum() + lse[:, :, :3].sum(), leaves):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("power", [2, 4, 40])
def test_large_scores_do_not_overflow(power):
    q, k, v = tensors(20, dtype=torch.float64)
    method = ha.LevAttention(20, p=2) if power == 2 else ha.LevAttention(20, p=power + 0.5)
    ours, lse = with_lse(1e150 * q, k, v, method=method, scale=1.0)
    assert_exact(ours, dense(q, k, v, float(method.p))[0], size=10.0)
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("online", [False, True])
def test_a_key_that_is_not_finite_is_in_every_set(poison, online):
    q, k, v = tensors(40)
    k[0, 1, 12, 2] = poison
    clean, _ = with_lse(*tensors(40), is_causal=True, method=ha.LevAttention(5, online=online))
    out, _ = with_lse(q, k, v, is_causal=True, method=ha.LevAttention(5, online=online))
    # the rows that see it, of its own head; no others
    broken = ~torch.isfinite(out).all(-1)
    assert broken[0, 1].tolist() == [row >= 12 for row in range(40)]
    assert not broken[0, 0].any()
    assert_same_bits(out[0, 0], clean[0, 0])
    with pytest.raises(ValueError, match="key holds 1 values that are NaN or infinite"):
        ha.attention(q, k, v, method=ha.LevAttention(5), check_finite=True)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 0), (0, 5), (5, 0), (1, 1), (40, 1), (1, 40)])
@every_take
def test_few_tokens_or_none(method, num_queries, num_keys):
    q, k, v = tensors(num_queries, num_keys, heads=4, value_dim=3)
    for causal, align in ((False, "upper_left"), (True, "upper_left"), (True, "lower_right")):
        out, lse = with_lse(q, k, v, method=method, is_causal=causal, causal_align=align, enable_gqa=True)
        assert out.shape == (1, 4, num_queries, 3)
        if num_keys == 1 and num_queries == 1:
            assert_exact(out, v.repeat_interleave(2, 1))
        if not num_keys:
            assert (out == 0).all()
            assert (lse == -torch.inf).all()


def test_half_precision_is_accumulated_in_single():
    q, k, v = (x.bfloat16() for x in tensors(60))
    out, lse = with_lse(q, k, v, method=ha.LevAttention(9))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    wide_out, _ = with_lse(q.float(), k.float(), v.float(), method=ha.LevAttention(9))
    assert_exact(out, wide_out)


def test_packed_sequences_are_apart():
    q, k, v = tensors(70, heads=4, kv_heads=2)
    edges = torch.tensor([0, 20, 70])
    out = ha.varlen_attention(q, k, v, edges, is_causal=True, enable_gqa=True, method=ha.LevAttention(9))
    for a, b in ((0, 20), (20, 70)):
        alone = ha.attention(*(x[:, :, a:b] for x in (q, k, v)), is_causal=True, enable_gqa=True, method=ha.LevAttention(9))
        assert_exact(out[:, :, a:b], alone)


WRONG = {
    "neither": ({}, "give either num, the number of keys, or epsilon"),
    "both": ({"num": 4, "epsilon": 0.1}, "give either num, the number of keys, or epsilon"),
    "no key": ({"num": 0}, "num=0.: num must be a positive integer"),
    "fewer than none": ({"num": -3}, "num=-3.: num must be a positive integer"),
    "epsilon of 0": ({"epsilon": 0.0}, "epsilon must lie between 0 and 1"),
    "epsilon of 1": ({"epsilon": 1.0}, "epsilon must lie between 0 and 1"),
    "p below 1": ({"num": 4, "p": 0.5}, "p is 0.5; it must be a finite number of at least 1"),
    "p without end": ({"num": 4, "p": float("inf")}, "p is inf; it must be a finite number of at least 1"),
    "online for other powers": ({"num": 4, "p": 4, "online": True}, "online scores are leverage scores, for p=2"),
    "online by a threshold": ({"epsilon": 0.1, "online": True}, "online scores are leverage scores, for p=2, and need num"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_refused(name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        ha.LevAttention(**arguments)


def test_what_it_costs_and_what_it_cannot_say():
    assert ha.LevAttention(32).cost(4096).pairs == 32
    assert ha.LevAttention(32).cost(4096, head_dim=16).selection_pairs == 32
    assert ha.LevAttention(epsilon=0.1).cost(4096, head_dim=16).pairs == pytest.approx(160)
    assert ha.LevAttention(epsilon=0.1, p=4).cost(4096, head_dim=16).pairs == pytest.approx(1360)
    assert ha.LevAttention(epsilon=0.1, p=4).cost(400, head_dim=16).pairs == 400
    assert not ha.LevAttention(32).complete
    assert ha.LevAttention(32, online=True).cost(10**6).pairs == ha.LevAttention(32, online=True).cost(10**4).pairs
    q, k, v = tensors(20)
    with pytest.raises(NotImplementedError, match="does not give the standard error"):
        ha.measured_attention(q, k, v, method=ha.LevAttention(4), standard_error=True)


def test_a_graph_can_name_it():
    method = ha.LevAttention(9, p=3)
    assert is_opaque(method)
    assert '"type":"LevAttention"' in write_method(method).replace(" ", "")
    assert eval(repr(method), {"LevAttention": ha.LevAttention}) == method
