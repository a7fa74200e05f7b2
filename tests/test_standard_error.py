"""Standard errors: the formula against a loop, what they are where nothing is drawn, and who refuses them."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import hyperattention as ha
from assertions import assert_exact, assert_same_bits
from cases import CASES, CONTROL, DESCENT, MIXTURE
from front_door import with_error, with_lse
from hyperattention.kernels.list.error import error_variance
from hyperattention.kernels.list.operator import list_attention
from hyperattention.methods.method import Method
from hyperattention.problem import Pages
from hyperattention.select.stage import CoveredKeys
from hyperattention.tiling import Tiles
from hyperattention.types import DrawnSlots, Runs, Selection
from problems import problem, tensors
from random_lists import LISTS, SCALE, TILES, counts, make_selection, make_tensors

HASHED = ha.Method(ha.Sinks(4), ha.Window(16), ha.HashBuckets(16), ha.Draw(16), tile=16)

# the formula


def sampled_selection(seed: int) -> Selection:
    """Random lists of which two runs are samples: of several parts, with certain slots, empty ones and single draws."""
    selection = make_selection(seed=seed, slots=(9, 2, 2, 2))
    first, block, *_ = selection.runs
    weight = first.log_weight.clone()
    weight[..., 1], weight[..., 5] = 0.0, 0.0
    # expected listings above and below one, beside certain slots
    listings = torch.rand(LISTS, TILES, 9, generator=torch.Generator().manual_seed(seed)).double() * 1.6
    listings[..., 7] = 1.0
    one = replace(first, log_weight=weight, causal=True, sample=DrawnSlots((4, 1, 4), (True, False, True)))
    two = replace(first, labelled=True, sample=DrawnSlots((5, 4), (True, False), listings))
    certain = replace(block, log_weight=torch.where(block.log_weight > -torch.inf, 0.0, -torch.inf))
    return replace(selection, runs=(one, certain, two))


def randomness(run: Runs, slot: int, evenly: bool, at: tuple[int, int]) -> float:
    weight = run.log_weight[at][slot].item()
    if weight == 0:
        return 0.0
    assert run.sample is not None
    e = 0.0 if weight == -torch.inf else float(torch.tensor(-weight).double().exp())
    if run.sample.listings is not None:
        e = run.sample.listings[at][slot].item()
    if evenly:
        return 1 - e if e < 1 else min(e - 1, 0.25)
    e = min(e, 1.0)
    return (1 - e + e**2 / 3) / (1 - e**2 / 6)


def variance_by_loop(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    """The definition: leave out one slot after another, and compare neighbours."""
    result = torch.zeros(q.shape[:3], dtype=torch.float64)
    for at in [(lst, tile, row) for lst in range(q.shape[0]) for tile in range(q.shape[1]) for row in range(q.shape[2])]:
        source, slots = selection.key_row[at[0]], []
        for number, run in enumerate(selection.runs):
            for slot, first in enumerate(run.first[at[:2]].tolist()):
                for key in range(first, first + run.size):
                    if run.log_weight[at[:2]][slot] > -torch.inf and counts(selection, run, at, key):
                        score = q[at] @ k[source, key] * SCALE + run.log_weight[at[:2]][slot]
                        slots.append(((number, slot), score.exp(), v[source, key]))
        total = sum(weight for _, weight, _ in slots)
        mean = sum(weight * value for _, weight, value in slots) / total if slots else torch.zeros(v.shape[2])
        lost = {}
        for name, weight, value in slots:
            rest = total - weight
            without = (mean * total - weight * value) / rest if rest > 0.01 * total else None
            # below one part in a hundred the rest is taken for that much
            lost[name] = mean - without if without is not None else (value - mean) * weight / (0.01 * total)
        for number, run in enumerate(selection.runs):
            begun = 0
            for size, evenly in zip(run.sample.sizes, run.sample.evenly, strict=True) if run.sample else ():
                part = range(begun, begun + size)
                t = [lost.get((number, slot), torch.zeros(v.shape[2], dtype=torch.float64)) for slot in part]
                f = [randomness(run, slot, evenly, at[:2]) for slot in part]
                smaller = [min(x, y) for x, y in pairwise(f)]
                if sum(smaller) > 0:
                    squares = sum(g * (x - y).square().sum() for g, (x, y) in zip(smaller, pairwise(t), strict=True))
                    result[at] += 0.5 * squares * sum(f) / sum(smaller)
                else:
                    result[at] += sum(g * x.square().sum() for g, x in zip(f, t, strict=True))
                begun += size
    return result


def variance(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    out, lse = list_attention(q, k, v, selection, SCALE)
    return error_variance((q, out, lse[..., None]), k, v, selection, SCALE)


@pytest.mark.parametrize("seed", range(4))
def test_the_formula_is_that_of_a_loop_over_rows_and_slots(seed):
    inputs, selection = make_tensors(seed=seed), sampled_selection(seed)
    expected = variance_by_loop(*inputs, selection)
    assert (expected > 0).double().mean() > 0.5
    # weights are float32
    assert_exact(variance(*inputs, selection).float(), expected.float())


def test_chunks_change_nothing(monkeypatch):
    from hyperattention.kernels.list import reference as list_torch

    inputs, selection = make_tensors(), sampled_selection(0)
    whole = variance(*inputs, selection)
    for name in [name for name in vars(list_torch) if name.endswith("_BYTES")]:
        monkeypatch.setattr(list_torch, name, 1)
    assert_exact(variance(*inputs, selection), whole)


def test_what_all_values_share_is_no_error():
    (q, k, v), selection = make_tensors(), sampled_selection(0)
    plain = variance(q, k, v, selection)
    # odds of up to 99 multiply what rounding did
    size = 99 * plain.max().item()
    assert_exact(variance(q, k, -3 * v, selection), 9 * plain, size=9 * size)
    # values far from 0 are rounded before anything is computed; squares of them, cancelled, would be far more wrong
    far = 1e6
    assert_exact(variance(q, k, v + far, selection), plain, size=far * size)


def test_equal_values_leave_no_error_and_no_nan():
    (q, k, _), selection = make_tensors(torch.float32), sampled_selection(0)
    v = torch.tensor([0.1, 0.7]).expand(*k.shape[:2], 2)
    ours = variance(q, k, v, selection)
    assert (ours >= 0).all()
    assert ours.max() < 1e-6


def test_a_draw_tells_how_its_slots_were_drawn():
    tokens = problem(150, causal=False)
    ((_, alone),) = ha.Method(ha.Draw(64, by=DESCENT), tile=16).selections(tokens)
    assert alone.runs[0].sample == DrawnSlots((64,), (True,))
    ((_, mixed),) = ha.Method(ha.Draw(64, by=MIXTURE), tile=16).selections(tokens)
    sample = mixed.runs[0].sample
    assert sample is not None
    assert (sample.sizes, sample.evenly) == ((43, 15, 6), (True, True, False))
    # a descent, scored blocks, and an even sample that any key may be in
    assert sample.listings is not None
    assert_exact(sample.listings[..., 58:], torch.full((2, 10, 6), 6 / 150))
    # listed by the others as well, a key weighs less than its own sample alone would have it weigh
    assert (mixed.runs[0].log_weight <= -sample.listings.log() + 1e-6).all()
    # in order of the strata
    assert (mixed.runs[0].first[..., 58:].diff(dim=-1) >= 0).all()


# what is asked for, and what comes back


def errors(method: ha.Method | ha.Exact, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    options = {"is_causal": True, "enable_gqa": True, "method": method} | options
    return with_error(q, k, v, **options)[1]


@pytest.mark.parametrize("case", [case for case in CASES if case.method.complete], ids=lambda case: case.name)
def test_where_all_keys_are_listed_there_is_none(case):
    stages = case.method.stages if isinstance(case.method, Method) else ()
    if isinstance(case.method, ha.HyperAttention | ha.PooledChunks | ha.Scatterbrain) or not all(
        stage.tells_error for stage in stages
    ):
        with pytest.raises(NotImplementedError, match="does not give the standard error"):
            errors(case.method, *tensors(50))
        return
    few, many = (errors(case.method, *tensors(n)) for n in (case.exact_up_to, 2 * case.num_tokens))
    assert_same_bits(few, torch.zeros_like(few))
    assert (many[:, :, -1] > 0).all() == isinstance(case.method, Method)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", [CONTROL, HASHED, ha.Exact()], ids=["control", "hashed", "exact"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_asking_changes_neither_output_nor_gradient(method, dtype, causal):
    q, k, v = (x.requires_grad_() for x in tensors(60, heads=4, dtype=dtype))
    options = {"method": method, "is_causal": causal, "enable_gqa": True}
    result = ha.measured_attention(q, k, v, standard_error=True, audit=10, **options)
    out, lse, error, report = result.out, result.lse, result.standard_error, result.audit
    plain, plain_lse = with_lse(q, k, v, **options)
    assert_same_bits(out, plain)
    assert_same_bits(lse, plain_lse)
    assert isinstance(report, ha.ErrorReport)
    assert error.shape == lse.shape
    assert error.dtype == lse.dtype
    assert not error.requires_grad
    for x, y in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, plain)), strict=True):
        assert_same_bits(x, y)


def test_rows_of_a_group_and_masked_keys():
    q, k, v = tensors(150, batch=2, heads=4)
    live = torch.ones(2, 150, dtype=torch.bool)
    live[0, :40], live[1, 100:] = False, False
    for method in (CONTROL, HASHED):
        before = errors(method, q, k, v, key_mask=live)
        assert_same_bits(before[0, :, :40], torch.zeros(4, 40))
        assert (before[:, :, -1] > 0).all()
        other = [x.masked_fill(~live[:, None, :, None], torch.nan) for x in (k, v)]
        assert_same_bits(errors(method, q, *other, key_mask=live), before)
    # heads of a group share their draws
    q, k, v = tensors(150, dtype=torch.float64)
    alone = errors(CONTROL, q, k, v)
    assert_exact(errors(CONTROL, q.repeat_interleave(3, 1), k, v), alone.repeat_interleave(3, 1))


@pytest.mark.parametrize("method", [CONTROL, ha.Method(ha.Window(16), ha.Draw(16, by=DESCENT), tile=16)], ids=str)
def test_later_tokens_change_no_earlier_tile(method):
    q, k, v = tensors(150)
    other = [torch.cat([x[:, :, :96], -x[:, :, 96:].flip(2)], 2) for x in (q, k, v)]
    after, before = (errors(method, *x) for x in (other, (q, k, v)))
    assert_same_bits(after[:, :, :96], before[:, :, :96])
    assert not torch.equal(after[:, :, 96:], before[:, :, 96:])


def test_dense_masks_and_few_tokens():
    q, k, v = tensors(10)
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    error = with_error(q, k, v, mask, method=ha.Exact())[1]
    assert_same_bits(error, torch.zeros(1, 2, 10))
    for shape in ((0, 0), (5, 0), (0, 5), (1, 1)):
        q, k, v = tensors(*shape)
        assert_same_bits(errors(CONTROL, q, k, v), torch.zeros(q.shape[:3]))


def test_keys_in_pages():
    whole = problem(150)
    pages = [torch.cat([x[0], x.new_zeros(2, 2, 8)], 1).unflatten(1, (19, 8)).transpose(0, 1) for x in (whole.k, whole.v)]
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    stored = Pages(pages[0][order], pages[1][order], order.argsort()[None])
    ours, expected = (CONTROL.attend_with_error(x)[1] for x in (replace(whole, stored=stored), whole))
    assert_same_bits(ours, expected)


def test_refusals():
    q, k, v = tensors(150)
    with pytest.raises(ValueError, match=r"drops keys.*Draw\(64\)"):
        errors(ha.Method(ha.Sinks(4), ha.Window(16)), q, k, v)
    with pytest.raises(NotImplementedError, match="audit=64"):
        errors(ha.HyperAttention(), q, k, v)

    class Silent(ha.Draw):
        """Draws, and does not say so."""

        def select(self, tiles: Tiles, taken: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
            (run,), taken = super().select(tiles, taken)
            return (replace(run, sample=None),), taken

    with pytest.raises(ValueError, match=r"sample=DrawnSlots"):
        errors(ha.Method(Silent(16)), q, k, v)
