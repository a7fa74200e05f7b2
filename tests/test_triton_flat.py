"""The fast list kernel, in the interpreter: which selections it reads, how they are flattened, and what comes out."""

from collections import Counter
from dataclasses import replace
from math import log

import pytest
import torch

import hyperattention as ha
from assertions import assert_exact, assert_same_math
from flat_lists import make_flat_selection, make_lying_selections
from front_door import with_lse
from hyperattention.kernels.list import operator as operator
from hyperattention.kernels.list.flat_form import BLOCK, flat_form_of
from hyperattention.kernels.list.operator import fields, list_attention
from hyperattention.kernels.list.reference import Lists
from problems import tensors
from random_lists import SCALE, expand, gradients, make_selection, make_tensors, triple_loop

pytestmark = pytest.mark.usefixtures("triton_kernel")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEYS = 200


def lists_of(selection) -> Lists:
    return Lists(*fields(selection))


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels launched, in order."""
    from hyperattention.kernels.launch import Launch

    names, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: names.append(self.kernel.__name__) or run(self))
    return names


@pytest.fixture
def in_pytorch(monkeypatch):
    """Run a function on the PyTorch kernel."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(operator, "triton_reads", lambda *tensors: False)
            return function()

    return run


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ranges", "group"), [(0, 1), (1, 1), (2, 1), (2, 3)])
def test_forward_is_that_of_the_pytorch_kernel(dtype, causal, ranges, group, launched, in_pytorch):
    x, selection = make_tensors(dtype, 1, KEYS, 6, (20, 5)), make_flat_selection(rows=6, causal=causal, ranges=ranges)
    # rows are heads of a group times positions
    x = x[0].unflatten(2, (group, -1)), *x[1:]
    ours = list_attention(*x, selection, SCALE)
    assert launched == ["_flatten_kernel", "_flat_kernel"]
    # numbers of float64 are left to the PyTorch kernel
    truth = list_attention(*(t.double() for t in x), selection, SCALE)
    plain = in_pytorch(lambda: list_attention(*x, selection, SCALE))
    for a, b, c in zip(ours, truth, plain, strict=True):
        assert_same_math(a, b, c)


@pytest.mark.parametrize("kind", make_lying_selections())
@pytest.mark.parametrize(("dtype", "rows", "group"), [(torch.float32, 6, 2), (torch.bfloat16, 150, 1)], ids=str)
def test_one_group_beside_ranges_is_read_as_it_lies(dtype, rows, group, kind, launched, in_pytorch):
    x, selection = make_tensors(dtype, 2, KEYS, rows, (20, 5)), make_lying_selections(rows=rows)[kind]
    x = x[0].unflatten(2, (group, -1)), *x[1:]
    ours = list_attention(*x, selection, SCALE)
    assert launched == ["_flat_kernel"]
    truth = list_attention(*(t.double() for t in x), selection, SCALE)
    plain = in_pytorch(lambda: list_attention(*x, selection, SCALE))
    for a, b, c in zip(ours, truth, plain, strict=True):
        assert_same_math(a, b, c)


def test_a_causal_group_of_several_blocks_is_laid_out(launched):
    x, selection = make_tensors(torch.float32, 1, KEYS, 6, (20, 5)), make_lying_selections(rows=6)["drawn"]
    list_attention(*x, replace(selection, runs=(replace(selection.runs[0], causal=True),)), SCALE)
    assert launched == ["_flatten_kernel", "_flat_kernel"]


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """``[tokens, heads, width]`` in memory, seen by head."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def beside_others(x: torch.Tensor) -> torch.Tensor:
    """Some tokens, and some numbers of each, of a larger tensor that is not a number elsewhere."""
    wide = torch.full((x.shape[0], x.shape[1] + 7, x.shape[2] + 3), torch.nan)
    wide[:, 4:-3, 2:-1] = x
    return wide[:, 4:-3, 2:-1]


def every_other_number(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def in_every_list(x: torch.Tensor) -> torch.Tensor:
    """Both rows of keys are one in memory."""
    return x[:1].expand(2, -1, -1)


@pytest.mark.parametrize(
    ("layout", "apart"),
    [(tokens_first, "k"), (tokens_first, "v"), (beside_others, "qkv"), (every_other_number, "qkv"), (in_every_list, "kv")],
)
def test_inputs_that_are_not_contiguous(layout, apart, launched, in_pytorch):
    x, selection = make_tensors(torch.float32, 1, KEYS, 5, (20, 5)), make_flat_selection(rows=5)
    x = tuple(layout(t.flatten(1, -2)).view_as(t) if name in apart else t for name, t in zip("qkv", x, strict=True))
    assert [t.is_contiguous() for t in x] == [name not in apart for name in "qkv"]
    ours = list_attention(*x, selection, SCALE)
    assert launched == ["_flatten_kernel", "_flat_kernel"]
    plain = in_pytorch(lambda: list_attention(*(t.contiguous() for t in x), selection, SCALE))
    for a, b in zip(ours, plain, strict=True):
        assert_exact(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_pytorch_kernel(dtype, launched, in_pytorch):
    x, selection = make_tensors(dtype, 1, KEYS, 6, (20, 5)), make_flat_selection(rows=6)
    ours = gradients(list_attention, x, selection)
    assert launched[:3] == ["_flatten_kernel", "_flat_kernel", "_queries_kernel"]
    for a, b in zip(ours, in_pytorch(lambda: gradients(list_attention, x, selection)), strict=True):
        assert_exact(a, b)


def test_forward_is_that_of_the_triple_loop(launched):
    x, selection = make_tensors(torch.float32, 1, KEYS, 3, (20, 5)), make_flat_selection(rows=3)
    ours, truth = list_attention(*x, selection, SCALE), triple_loop(*(t.double() for t in x), selection, SCALE)
    assert launched == ["_flatten_kernel", "_flat_kernel"]
    for a, b, c in zip(ours, truth, triple_loop(*x, selection, SCALE), strict=True):
        assert_same_math(a, b, c)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("causal", [True, False])
def test_flat_lists_name_what_the_selection_names(seed, causal):
    from hyperattention.kernels.list.triton_flatten import flatten

    selection = make_flat_selection(seed=seed, causal=causal)
    if seed == 3:
        selection = replace(selection, row_limit=selection.row_limit.clamp(min=150))
    form = flat_form_of(lists_of(selection), KEYS, paged=False)
    assert form is not None
    assert form.num_ranges == 2
    flat = flatten(form)
    tiles = selection.row_limit.flatten(0, 1)
    runs = [(expand(run), run.causal) for run in selection.runs]
    for tile, header in enumerate(flat.header.tolist()):
        begin, length, begin_2, total, special, causal_from, listed, tested = header
        least = tiles[tile].min().item()
        expected = Counter()
        for run, may_test in runs:
            keys, weights = (x.flatten(0, 1)[tile].tolist() for x in (run.first, run.log_weight))
            for key, weight in zip(keys, weights, strict=True):
                if weight > -torch.inf:
                    expected[key, round(weight, 4), may_test and key >= least] += 1
        found = Counter()
        for place in range(total):
            key = place + (begin if place < length else begin_2 - length)
            weight = flat.range_weight[tile, 0 if place < length else 1].item() * log(2)
            found[key, round(weight, 4), place >= causal_from and key >= least] += 1
            if place < special:
                assert place < causal_from or key < least
                assert flat.range_weight[tile, 0] == flat.range_weight[tile, 0 if place < length else 1]
        index, weights = flat.index[tile].tolist(), (flat.log_weight[tile] * log(2)).tolist()
        for place in range(listed):
            found[index[place], round(weights[place], 4), place < tested] += 1
        assert found == expected
        for place in range(listed, -(-listed // BLOCK) * BLOCK):
            assert weights[place] == -torch.inf
            assert index[place] in index[:listed]


@pytest.mark.parametrize("kind", ["laid out", *make_lying_selections()])
def test_keys_that_are_not_listed_may_be_anything(kind):
    x, selection = make_tensors(torch.float32, 1, KEYS, 5, (20, 5)), make_flat_selection(rows=5, causal=False)
    if kind != "laid out":
        selection = make_lying_selections(rows=5)[kind]
    for at in ((0, 0), (1, 2)):
        # a tile by itself: what no other tile lists may be anything as well
        listed, row = torch.zeros(KEYS, dtype=torch.bool), selection.key_row[at[0]]
        for run in selection.runs:
            one = expand(run)
            listed[one.first[at][one.log_weight[at] > -torch.inf]] = True
        assert not listed.all()
        poisoned = [t.clone() for t in x[1:]]
        for t in poisoned:
            t[row, ~listed] = torch.nan
        ours, plain = (list_attention(x[0], *y, selection, SCALE) for y in (poisoned, x[1:]))
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a[at], b[at])


@pytest.mark.parametrize("nothing", ["limits of 0", "no key that counts", "empty slots"])
def test_rows_that_see_nothing(nothing, launched):
    x, selection = make_tensors(torch.float32, 1, KEYS, 5, (20, 5)), make_flat_selection(rows=5)
    runs = selection.runs
    if nothing == "limits of 0":
        runs = tuple(replace(run, causal=True) for run in runs)
        selection = replace(selection, row_limit=torch.zeros_like(selection.row_limit))
    elif nothing == "no key that counts":
        runs = tuple(replace(run, high=run.low) for run in runs)
    else:
        runs = tuple(replace(run, log_weight=torch.full_like(run.log_weight, -torch.inf)) for run in runs)
    out, lse = list_attention(*x, replace(selection, runs=runs), SCALE)
    assert launched == ["_flatten_kernel", "_flat_kernel"]
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_not_hidden(weight):
    x, selection = make_tensors(torch.float32, 1, KEYS, 5, (20, 5)), make_flat_selection(rows=5, causal=False, ranges=0)
    drawn = selection.runs[1]
    drawn.log_weight[0, 0, 3], drawn.low[0, 0], drawn.high[0, 0], drawn.first[0, 0, 3] = weight, 0, KEYS, 17
    out, _ = list_attention(*x, selection, SCALE)
    assert out[0, 0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [ha.Method(ha.Window(70), ha.Draw(30), tile=32), ha.Method(ha.Draw(30), tile=32)], ids=repr
)
@pytest.mark.parametrize("causal", [True, False])
def test_methods_under_a_key_mask(method, causal, launched, in_pytorch):
    q, k, v = tensors(150, batch=2, heads=2, kv_heads=1, head_dim=20, value_dim=5)
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[0, :37] = False
    mask[1, 120:] = False

    def attend():
        return with_lse(q, k, v, is_causal=causal, enable_gqa=True, method=method, key_mask=mask)

    ours = attend()
    assert launched.count("_flat_kernel") == 1
    for a, b in zip(ours, in_pytorch(attend), strict=True):
        assert_exact(a, b)


def test_what_the_fast_kernel_does_not_read_is_left_to_the_general_one(launched):
    selection = make_flat_selection()
    labels, gaps = make_selection(), make_selection()
    labels, gaps = replace(labels, row_gap=None), replace(gaps, row_label=None, key_label=None)
    long = replace(selection, runs=(replace(selection.runs[0], size=1000),))
    assert flat_form_of(lists_of(selection), KEYS, paged=False) is not None
    assert flat_form_of(lists_of(selection), KEYS, paged=True) is None
    assert flat_form_of(lists_of(selection), 2**31, paged=False) is None
    for unread in (labels, gaps, long):
        assert flat_form_of(lists_of(unread), KEYS, paged=False) is None
    drawn = make_lying_selections()["drawn"].runs[0]
    drawn = replace(drawn, **{name: getattr(drawn, name).repeat(1, 1, 40) for name in ("first", "log_weight")})
    for causal, read in ((False, True), (True, False)):
        several = replace(selection, runs=(replace(drawn, causal=causal),))
        assert (flat_form_of(lists_of(several), KEYS, paged=False) is not None) == read
    x = make_tensors(torch.float32)
    for unread in (labels, gaps):
        list_attention(*x, unread, SCALE)
    assert launched == ["_forward_kernel"] * 2
