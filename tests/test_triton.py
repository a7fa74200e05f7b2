"""The Triton kernels, in the interpreter: what they compute is what the PyTorch kernel and the triple loop compute."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import hyperattention as ha
from assertions import assert_exact, assert_same_math
from front_door import with_lse
from hyperattention.error import exact_rows
from hyperattention.exact import exact_attention
from hyperattention.kernels.list import operator as operator
from hyperattention.kernels.list.operator import list_attention
from hyperattention.layouts import packed as varlen
from hyperattention.layouts import ragged
from hyperattention.select.score.block_score import BlockScore
from problems import tensors
from random_lists import KEYS, LOG_2, SCALE, expand, gradients, make_selection, make_tensors, triple_loop

pytestmark = pytest.mark.usefixtures("triton_kernel")

# of every kind of run: fewer slots than a block, more than one, none at all
SLOTS = {1: (3, 1, 1, 1), 63: (70, 7, 5, 9), 100: (0, 1, 20, 30), 257: (33, 40, 1, 2)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LISTS = ha.Method(ha.Sinks(4), ha.Window(16), ha.TopBlocks(2, block_size=8), ha.Draw(12, by=BlockScore(8)), tile=16)
HASHED = ha.Method(ha.Sinks(2), ha.HashBuckets(16), ha.Draw(8), tile=8)


def attend_and_differentiate(attend, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = tuple(t.detach().requires_grad_() for t in x)
    out, lse = attend(*leaves)
    ramp = torch.linspace(0.5, 2, out.numel()).view(out.shape)
    loss = (out.float() * ramp).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * ramp[..., 0]).sum()
    return (out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves))


@pytest.fixture
def in_pytorch(monkeypatch):
    """Run a function on the PyTorch kernel."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(operator, "triton_reads", lambda *tensors: False)
            return function()

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "keys"),
    [
        # one length of many slots in one dtype, and all dtypes at few; `make test-heavy` runs the product
        *((dtype, keys) for dtype in DTYPES for keys in (1, 63)),
        (torch.float32, 100),
        *(pytest.param(dtype, 100, marks=pytest.mark.heavy) for dtype in DTYPES[1:]),
        *(pytest.param(dtype, 257, marks=pytest.mark.heavy) for dtype in DTYPES),
    ],
    ids=str,
)
def test_forward_and_gradients_are_those_of_the_triple_loop(dtype, keys):
    rows = 3 if keys == 63 else 18
    x, lists = (
        make_tensors(dtype, keys, keys, rows, (20, 5)),
        make_selection(seed=keys, keys=keys, slots=SLOTS[keys], rows=rows),
    )
    wide = tuple(t.double() for t in x)
    ours, truth = list_attention(*x, lists, SCALE), triple_loop(*wide, lists, SCALE)
    assert_same_math(ours[0], truth[0], triple_loop(*x, lists, SCALE)[0])
    assert_same_math(ours[1], truth[1], triple_loop(*(t.float() for t in x), lists, SCALE)[1])
    ours, truth, plain = (
        gradients(attend, t, lists) for attend, t in ((list_attention, x), (triple_loop, wide), (triple_loop, x))
    )
    for a, b, c in zip(ours, truth, plain, strict=True):
        assert_same_math(a, b, c)


@pytest.mark.parametrize("method", [LISTS, HASHED], ids=["lists", "hashed"])
@pytest.mark.parametrize("num_tokens", [1, 63, 100, pytest.param(257, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_methods_at_odd_lengths_and_groups(method, num_tokens, group, in_pytorch):
    if group == 8 and num_tokens == 257:
        num_tokens = 129  # the interpreter takes 10 s for the longer one
    x = tensors(num_tokens, heads=group, kv_heads=1, head_dim=16, value_dim=8)

    def attend(*x):
        return with_lse(*x, is_causal=True, enable_gqa=True, method=method)

    ours, plain = (run(lambda: attend_and_differentiate(attend, x)) for run in (lambda f: f(), in_pytorch))
    for a, b in zip(ours, plain, strict=True):
        assert torch.isfinite(a).all()
        assert_exact(a, b)


@pytest.mark.slow
def test_tiles_of_more_rows_than_a_program_takes(in_pytorch):
    x, lists = make_tensors(torch.float32, rows=150), make_selection(rows=150)
    ours, plain = (run(lambda: gradients(list_attention, x, lists)) for run in (lambda f: f(), in_pytorch))
    for a, b in zip(ours, plain, strict=True):
        assert_exact(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits", [2, 3, pytest.param(50, marks=pytest.mark.heavy)])
def test_a_split_list_is_the_whole_list(splits, dtype):
    from hyperattention.kernels.list import triton_forward as list_triton

    x, lists = make_tensors(dtype, keys=100), make_selection(keys=100, slots=SLOTS[63])
    split = run_with(partial(list_triton.forward, splits=splits), x, lists)
    whole = run_with(partial(list_triton.forward, precise=True), x, lists)
    assert split[0].dtype == dtype
    # parts are merged in float32, and rounded once
    assert_exact(split[1], whole[1])
    error = (split[0].float() - whole[0]).abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else 2.0**-8) * whole[0].abs().max()


def run_with(forward, x, lists):
    """Call a kernel's function with what the operator hands it."""
    from hyperattention.kernels.list.reference import Lists

    runs, gap = lists.runs, lists.row_gap or (None, None)
    none = torch.empty(0, dtype=torch.int64)
    flat = Lists(
        lists.key_row,
        lists.row_limit,
        [r.first for r in runs],
        [r.size for r in runs],
        [r.log_weight for r in runs],
        [r.low for r in runs],
        [r.high for r in runs],
        [none if r.hole is None else torch.stack(r.hole) for r in runs],
        [r.causal for r in runs],
        [r.labelled for r in runs],
        lists.row_label,
        lists.key_label,
        *gap,
    )
    return forward(x[0][:, :, None], *x[1:], flat, SCALE)


# laws


@pytest.mark.slow
def test_listing_twice_is_adding_log_2():
    x, lists = make_tensors(torch.float32), make_selection()
    twice = replace(lists, runs=lists.runs + lists.runs[:1])
    heavier = replace(lists.runs[0], log_weight=lists.runs[0].log_weight + LOG_2)
    once = replace(lists, runs=(heavier, *lists.runs[1:]))
    for a, b in zip(list_attention(*x, twice, SCALE), list_attention(*x, once, SCALE), strict=True):
        assert_exact(a, b)
    for a, b in zip(gradients(list_attention, x, twice), gradients(list_attention, x, once), strict=True):
        assert_exact(a, b)


@pytest.mark.parametrize("kind", ["no runs", "no slots", "all weights -inf", "no visible key", "no keys"])
def test_empty_lists_give_zero_and_no_gradient(kind):
    (q, k, v), lists = make_tensors(torch.float32), make_selection()
    runs = lists.runs
    if kind == "no runs":
        runs = ()
    elif kind == "no slots":
        runs = tuple(replace(run, first=run.first[..., :0], log_weight=run.log_weight[..., :0]) for run in runs)
    elif kind == "all weights -inf":
        runs = tuple(replace(run, log_weight=torch.full_like(run.log_weight, -torch.inf)) for run in runs)
    elif kind == "no visible key":
        runs = tuple(replace(run, causal=True) for run in runs)
        lists = replace(lists, row_limit=torch.zeros_like(lists.row_limit))
    else:
        k, v = k[:, :0], v[:, :0]
        nothing = tuple(replace(run, high=run.low) for run in runs)
        lists, runs = replace(lists, key_label=lists.key_label[:, :0]), nothing
    lists = replace(lists, runs=runs)
    out, lse = list_attention(q, k, v, lists, SCALE)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    for gradient in gradients(list_attention, (q, k, v), lists):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("layout", ["every other number", "tokens first"])
def test_non_contiguous_inputs(layout, in_pytorch):
    x, lists = make_tensors(torch.float32), make_selection()
    if layout == "tokens first":
        # [tokens, heads, width], seen by head
        apart = tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in x)
    else:
        apart = tuple(t.repeat_interleave(2, -1)[..., ::2] for t in x)
    assert not any(t.is_contiguous() for t in apart)
    ours, plain = gradients(list_attention, apart, lists), in_pytorch(lambda: gradients(list_attention, x, lists))
    for a, b in zip(ours, plain, strict=True):
        assert_exact(a, b)


def test_renumbering_keys_with_their_indices_changes_nothing():
    (q, k, v), lists = make_tensors(torch.float32), make_selection(tests=False)
    lists = replace(lists, runs=tuple(expand(run) for run in lists.runs))
    order = torch.randperm(KEYS, generator=torch.Generator().manual_seed(1))
    place = order.argsort()
    moved = replace(lists, runs=tuple(replace(run, first=place[run.first.clamp(0, KEYS - 1)]) for run in lists.runs))
    for a, b in zip(
        list_attention(q, k[:, order], v[:, order], moved, SCALE), list_attention(q, k, v, lists, SCALE), strict=True
    ):
        assert_exact(a, b)


def test_a_constant_on_all_log_weights_shifts_lse_alone():
    x, lists = make_tensors(torch.float32), make_selection()
    shifted = replace(lists, runs=tuple(replace(run, log_weight=run.log_weight + 5.0) for run in lists.runs))
    ours, before = (list_attention(*x, each, SCALE) for each in (shifted, lists))
    assert_exact(ours[0], before[0])
    assert_exact(ours[1], before[1] + 5.0)


@pytest.mark.parametrize("shift", [1e3, -1e3])
def test_scores_far_from_zero(shift, in_pytorch):
    (q, k, v), lists = make_tensors(torch.float32), make_selection()
    lists = replace(lists, runs=tuple(replace(run, log_weight=run.log_weight + shift) for run in lists.runs))
    ours, plain = (run(lambda: list_attention(10 * q, k, v, lists, SCALE)) for run in (lambda f: f(), in_pytorch))
    for a, b in zip(ours, plain, strict=True):
        assert torch.isfinite(a[0]).all()
        assert_exact(a, b, size=abs(shift))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_hold_what_rows_hold(dtype, in_pytorch):
    sequences, kv_heads, size, pages = 2, 2, 16, 7
    q, k, v = make_tensors(dtype, keys=pages * size, rows=5)
    q, lists = q.repeat(2, 1, 1, 1), make_selection(keys=pages * size, slots=SLOTS[63], rows=5, tests=False)
    lists = twofold(lists)
    k, v = (x[:, None].expand(-1, 2, -1, -1).flatten(0, 1) * torch.tensor([1.0, 2, 3, 4])[:, None, None] for x in (k, v))
    k, v = k.to(dtype), v.to(dtype)
    order = torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(0))
    table = order.view(sequences, pages)
    # a cache as serving engines lay it out: keys beside values, in pages that stand in any order
    by_page = (
        x.unflatten(0, (sequences, kv_heads)).unflatten(2, (pages, size)).transpose(1, 2).flatten(0, 1) for x in (k, v)
    )
    cache = torch.cat(list(by_page), -1)[order.argsort()]
    paged = cache[..., : k.shape[-1]], cache[..., k.shape[-1] :]
    flat = list_attention(q, k, v, lists, SCALE)
    for ours in (
        list_attention(q, *paged, lists, SCALE, table),
        in_pytorch(lambda: list_attention(q, *paged, lists, SCALE, table)),
    ):
        for a, b in zip(ours, flat, strict=True):
            assert_exact(a, b)


def twofold(lists):
    """The same lists for two kv heads."""

    def two(x):
        return None if x is None else x.repeat(2, *[1] * (x.dim() - 1))

    runs = tuple(
        replace(
            r,
            first=two(r.first),
            log_weight=two(r.log_weight),
            low=two(r.low),
            high=two(r.high),
            hole=None if r.hole is None else tuple(map(two, r.hole)),
        )
        for r in lists.runs
    )
    return replace(
        lists, runs=runs, row_limit=two(lists.row_limit), key_row=torch.tensor([2, 0, 1, 3]), row_label=None, key_label=None
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_rows_of_an_audit_are_exact_in_any_dtype(dtype, monkeypatch):
    monkeypatch.setattr(exact_rows, "triton_reads", lambda *x: True)
    q, k, v = tensors(3, 300, batch=2, heads=6, kv_heads=2, head_dim=24, dtype=dtype)
    visible = torch.tensor([1, 130, 300])
    ours = exact_rows.exact_rows(q, k, v, visible, 0.3)
    assert ours.dtype == torch.float32
    truth, plain = (
        exact_attention(*(x.to(d) for x in (q, k, v)), scale=0.3, visible=visible[None]).out
        for d in (torch.float64, torch.float32)
    )
    if dtype == torch.float32:
        assert_same_math(ours, truth, plain)
    # weights meet values of a narrow dtype in two parts, each of at least eight bits
    assert (ours - truth).abs().max() <= 2.0**-16 * v.abs().max()


@pytest.mark.parametrize("align", ["upper_left", "lower_right"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_share_one_launch(causal, align, in_pytorch, monkeypatch):
    q, k, v = tensors(140, 150, heads=4, kv_heads=2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    edges_q, edges_k = torch.tensor([0, 1, 1, 64, 140]), torch.tensor([0, 9, 20, 60, 150])
    options = {"is_causal": causal, "causal_align": align, "enable_gqa": True}

    def attend(*x):
        result = ha.measured_varlen_attention(*x, edges_q, edges_k, **options)
        return result.out, result.lse

    plain = in_pytorch(lambda: attend(q, k, v))
    monkeypatch.setattr(varlen, "triton_reads", lambda *x: True)
    launches = []
    monkeypatch.setattr(ragged, "list_attention", lambda *x: launches.append(1) or list_attention(*x))
    ours = attend(q, k, v)
    assert len(launches) == 1
    for a, b in zip(ours, plain, strict=True):
        assert_exact(a, b)
    # with gradients, and for one sequence alone, torch's kernel runs
    attend_and_differentiate(attend, (q, k, v))
    ha.varlen_attention(q, k, v, torch.tensor([0, 140]), torch.tensor([0, 150]), **options)
    assert len(launches) == 1


def test_pages_have_no_gradient():
    q, k, v = make_tensors(torch.float32)
    lists = make_selection(tests=False)
    pages = [x[:, None].requires_grad_() for x in (k, v)]
    lists = replace(lists, row_label=None, key_label=None)
    out, _ = list_attention(q, *pages, lists, SCALE, torch.tensor([[0], [1]]))
    with pytest.raises(NotImplementedError, match="under torch.no_grad"):
        out.sum().backward()


@pytest.mark.heavy
def test_operators_are_registered_soundly():
    captured = {}

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "hyperattention":
                captured[func] = args
            return func(*args, **(kwargs or {}))

    x = make_tensors(torch.float32)
    x[0].requires_grad_()
    with Spy():
        out, lse = list_attention(*x, make_selection(), SCALE)
        (out.sum() + lse[lse > -torch.inf].sum()).backward()
    assert len(captured) == 2
    for operator_, args in captured.items():
        differentiable = operator_ is torch.ops.hyperattention.list_attention.default
        args = tuple(x.detach().requires_grad_() if i < 3 and differentiable else x for i, x in enumerate(args))
        # the gradient of a gradient is no operator's
        checks = {} if differentiable else {"test_utils": ("test_schema", "test_faketensor")}
        torch.library.opcheck(operator_, args, **checks)


@pytest.mark.heavy
def test_checkpointing_recomputes_the_same_bits():
    from torch.utils.checkpoint import checkpoint

    def attend(*x):
        return with_lse(*x, is_causal=True, method=LISTS)

    x = tensors(100, head_dim=16)
    for a, b in zip(
        attend_and_differentiate(attend, x),
        attend_and_differentiate(lambda *y: checkpoint(attend, *y, use_reentrant=False), x),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("asked", [False, True])
def test_deterministic_algorithms_take_the_pytorch_gradient(asked, monkeypatch):
    from hyperattention.kernels.list import reference as list_torch
    from hyperattention.kernels.list import triton_backward as list_triton_backward

    ran = []
    for module in (list_torch, list_triton_backward):
        plain = module.backward
        monkeypatch.setattr(module, "backward", lambda *x, plain=plain, name=module.__name__: ran.append(name) or plain(*x))
    torch.use_deterministic_algorithms(asked)
    try:
        gradients(list_attention, make_tensors(torch.float32), make_selection())
    finally:
        torch.use_deterministic_algorithms(False)
    assert ran == [(list_torch if asked else list_triton_backward).__name__]
