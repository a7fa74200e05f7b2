"""The list kernel against a triple loop, and its laws: whatever lists it is given, it computes what they say."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_bits, assert_same_math
from hyperattention.kernels.list.operator import list_attention
from random_lists import KEYS, LISTS, LOG_2, SCALE, VALUE_WIDTH, expand, gradients, make_selection, make_tensors, triple_loop


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_forward_and_gradients_are_those_of_the_triple_loop(dtype, seed):
    tensors, selection = make_tensors(dtype, seed), make_selection(seed=seed)
    wide = tuple(x.double() for x in tensors)
    ours, truth, plain = (
        f(*x, selection, SCALE) for f, x in ((list_attention, tensors), (triple_loop, wide), (triple_loop, tensors))
    )
    assert (truth[1][-1, -1] == -torch.inf).all()
    assert_same_math(ours[0], truth[0], plain[0])
    # lse is at least float32, so that it is judged against plain PyTorch in that dtype
    wide_plain = triple_loop(*(x.to(ours[1].dtype) for x in tensors), selection, SCALE)
    assert_same_math(ours[1], truth[1], wide_plain[1])
    ours, truth, plain = (
        gradients(f, x, selection) for f, x in ((list_attention, tensors), (triple_loop, wide), (triple_loop, tensors))
    )
    for x, y, z in zip(ours, truth, plain, strict=True):
        assert_same_math(x, y, z)


def test_gradcheck():
    tensors, selection = make_tensors(), make_selection()
    tensors = tuple(x.requires_grad_() for x in tensors)

    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = list_attention(*x, selection, SCALE)
        return out, lse[lse > -torch.inf]

    assert torch.autograd.gradcheck(attend, tensors)


def test_operator_is_registered_soundly():
    captured = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.hyperattention.list_attention.default:
                captured.append(args)
            return func(*args, **(kwargs or {}))

    q, k, v = make_tensors()
    with Spy():
        # strides of its own, which the shapes promised to a compiler must not inherit
        list_attention(q.transpose(2, 3).contiguous().transpose(2, 3), k, v, make_selection(), SCALE)
    (args,) = captured
    args = tuple(x.detach().requires_grad_() if i < 3 else x for i, x in enumerate(args))
    torch.library.opcheck(torch.ops.hyperattention.list_attention.default, args)


def test_gradients_exist_for_one_output_alone():
    tensors, selection = make_tensors(), make_selection()
    for pick in (0, 1):
        leaves = tuple(x.detach().requires_grad_() for x in tensors)
        ours, truth = (f(*leaves, selection, SCALE)[pick] for f in (list_attention, triple_loop))
        ours, truth = (x[x > -torch.inf].sum() for x in (ours, truth))
        wanted = leaves if pick == 0 else leaves[:2]
        for x, y in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(truth, wanted), strict=True):
            assert_exact(x, y)


# laws


def test_renumbering_keys_with_their_indices_changes_nothing():
    (q, k, v), selection = make_tensors(), make_selection(tests=False)
    single = tuple(expand(run) for run in selection.runs)
    selection = replace(selection, runs=single)
    order = torch.randperm(KEYS, generator=torch.Generator().manual_seed(1))
    place = order.argsort()
    moved = tuple(replace(run, first=place[run.first.clamp(0, KEYS - 1)]) for run in single)
    ours = list_attention(q, k[:, order], v[:, order], replace(selection, runs=moved), SCALE)
    for x, y in zip(ours, list_attention(q, k, v, selection, SCALE), strict=True):
        assert_exact(x, y)


def test_a_run_is_its_keys_one_by_one():
    (q, k, v), selection = make_tensors(), make_selection(tests=False)
    ours = list_attention(q, k, v, replace(selection, runs=tuple(expand(run) for run in selection.runs)), SCALE)
    for x, y in zip(ours, list_attention(q, k, v, selection, SCALE), strict=True):
        assert_exact(x, y)


def test_listing_twice_is_adding_log_2():
    tensors, selection = make_tensors(), make_selection()
    twice = replace(selection, runs=selection.runs + selection.runs[:1])
    heavier = replace(selection.runs[0], log_weight=selection.runs[0].log_weight + LOG_2)
    once = replace(selection, runs=(heavier, *selection.runs[1:]))
    ours, expected = (list_attention(*tensors, x, SCALE) for x in (twice, once))
    for x, y in zip(ours, expected, strict=True):
        # the weight itself, log 2, is float32
        assert_exact(x.float(), y.float())


def test_a_constant_on_all_log_weights_shifts_lse_alone():
    tensors, selection = make_tensors(), make_selection()
    shifted = tuple(replace(run, log_weight=run.log_weight + 5.0) for run in selection.runs)
    ours, before = (list_attention(*tensors, x, SCALE) for x in (replace(selection, runs=shifted), selection))
    assert_exact(ours[0].float(), before[0].float())
    assert_exact(ours[1].float(), before[1].float() + 5.0)


def test_lists_that_share_a_key_row_are_repeated_kv_heads():
    (q, k, v), selection = make_tensors(), make_selection()
    shared = list_attention(q, k, v, replace(selection, key_row=torch.tensor([1, 1])), SCALE)
    repeated = list_attention(q, k[[0, 1, 1]], v[[0, 1, 1]], replace(selection, key_row=torch.tensor([1, 2])), SCALE)
    for x, y in zip(shared, repeated, strict=True):
        assert_same_bits(x, y)
    share, repeat = (
        gradients(list_attention, (q, a, b), replace(selection, key_row=torch.tensor(rows)))
        for a, b, rows in ((k, v, [1, 1]), (k[[0, 1, 1]], v[[0, 1, 1]], [1, 2]))
    )
    assert_exact(share[0], repeat[0])
    for x, y in zip(share[1:], repeat[1:], strict=True):
        assert_exact(x[1], y[1] + y[2])


def test_non_contiguous_inputs():
    (q, k, v), selection = make_tensors(), make_selection()
    apart = tuple(x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v))
    assert not apart[0].is_contiguous()
    for x, y in zip(list_attention(*apart, selection, SCALE), list_attention(q, k, v, selection, SCALE), strict=True):
        assert_exact(x, y)
    for x, y in zip(
        gradients(list_attention, apart, selection), gradients(list_attention, (q, k, v), selection), strict=True
    ):
        assert_exact(x, y)


def test_results_do_not_depend_on_how_tiles_are_chunked(monkeypatch):
    from hyperattention.kernels.list import reference as list_torch

    tensors, selection = make_tensors(), make_selection()
    whole = (*list_attention(*tensors, selection, SCALE), *gradients(list_attention, tensors, selection))
    for name in [name for name in vars(list_torch) if name.endswith("_BYTES")]:
        monkeypatch.setattr(list_torch, name, 1)
    apart = (*list_attention(*tensors, selection, SCALE), *gradients(list_attention, tensors, selection))
    for x, y in zip(apart, whole, strict=True):
        assert_exact(x, y)


# nothing to attend to


@pytest.mark.parametrize("kind", ["no runs", "no slots", "all weights -inf", "no visible key", "no keys"])
def test_empty_lists_give_zero_and_no_gradient(kind):
    (q, k, v), selection = make_tensors(), make_selection()
    runs = selection.runs
    if kind == "no runs":
        runs = ()
    elif kind == "no slots":
        runs = tuple(replace(run, first=run.first[..., :0], log_weight=run.log_weight[..., :0]) for run in runs)
    elif kind == "all weights -inf":
        runs = tuple(replace(run, log_weight=torch.full_like(run.log_weight, -torch.inf)) for run in runs)
    elif kind == "no visible key":
        runs = tuple(replace(run, causal=True) for run in runs)
        selection = replace(selection, row_limit=torch.zeros_like(selection.row_limit))
    else:
        k, v = k[:, :0], v[:, :0]
        selection = replace(selection, key_label=selection.key_label[:, :0])
    selection = replace(selection, runs=runs)
    out, lse = list_attention(q, k, v, selection, SCALE)
    assert_same_bits(out, torch.zeros_like(q[..., :VALUE_WIDTH]))
    assert_same_bits(lse, torch.full(q.shape[:3], -torch.inf, dtype=torch.float64))
    for gradient in gradients(list_attention, (q, k, v), selection):
        assert_same_bits(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_that_lists_what_is_not_finite_gives_what_softmax_gives(poison):
    (q, k, v), selection = make_tensors(), make_selection()
    # key 4 is out of bounds for the first two tiles of each list, and within those of the last
    low, high = (torch.tensor([bounds] * LISTS) for bounds in ([0, 5, 0], [4, KEYS, KEYS]))
    runs = tuple(replace(run, log_weight=run.log_weight.clamp(min=-1), low=low, high=high) for run in selection.runs)
    selection = replace(selection, runs=runs)
    bad = k.index_fill(1, torch.tensor([4]), poison)
    truth, ours = triple_loop(q, bad, v, selection, SCALE), list_attention(q, bad, v, selection, SCALE)
    assert not torch.isfinite(truth[0][:, 2]).all()
    assert torch.equal(torch.isfinite(ours[0]), torch.isfinite(truth[0]))
    for x, y in zip(ours, list_attention(q, k, v, selection, SCALE), strict=True):
        assert_same_bits(x[:, :2], y[:, :2])
