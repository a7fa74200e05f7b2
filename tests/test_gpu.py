"""On a GPU: compiled kernels, at sizes the interpreter cannot reach, and what only a device shows. `pytest -m gpu`."""

import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_math
from front_door import with_lse
from hyperattention.kernels.list.operator import list_attention
from hyperattention.select.score.block_score import BlockScore
from problems import tensors
from random_lists import SCALE, gradients, make_selection, make_tensors, triple_loop

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LISTS = ha.Method(ha.Sinks(4), ha.Window(64), ha.TopBlocks(4, block_size=16), ha.Draw(100, by=BlockScore(16)))
HASHED = ha.Method(ha.Sinks(2), ha.HashBuckets(64), ha.Draw(64))
DEFAULT = ha.default_method(10**6, device="cuda")
LEAN = ha.lean_method(65_536, device="cuda")


def on_gpu(x):
    """Move tensors, alone, in tuples, or in the fields of a dataclass."""
    if isinstance(x, Tensor):
        return x.cuda()
    if isinstance(x, tuple):
        return tuple(map(on_gpu, x))
    if hasattr(x, "__dataclass_fields__"):
        return type(x)(**{name: on_gpu(getattr(x, name)) for name in x.__dataclass_fields__})
    return x


def attend_and_differentiate(attend, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = tuple(t.detach().requires_grad_() for t in x)
    out, lse = attend(*leaves)
    ramp = torch.linspace(0.5, 2, out.numel(), device=out.device).view(out.shape)
    loss = (out.float() * ramp).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * ramp[..., 0]).sum()
    return (out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("keys", [1, 63, 100, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients_are_those_of_the_triple_loop(dtype, keys):
    x, lists = (
        make_tensors(dtype, keys, keys, 18, (20, 5)),
        make_selection(seed=keys, keys=keys, slots=(33, 40, 5, 9), rows=18),
    )
    wide = tuple(t.double() for t in x)
    ours = list_attention(*on_gpu(x), on_gpu(lists), SCALE)
    truth, plain = triple_loop(*wide, lists, SCALE), triple_loop(*x, lists, SCALE)
    assert_same_math(ours[0].cpu(), truth[0], plain[0])
    assert_same_math(ours[1].cpu(), truth[1], triple_loop(*(t.float() for t in x), lists, SCALE)[1])
    ours = gradients(list_attention, on_gpu(x), on_gpu(lists))
    truth, plain = gradients(triple_loop, wide, lists), gradients(triple_loop, x, lists)
    for a, b, c in zip(ours, truth, plain, strict=True):
        assert_same_math(a.cpu(), b, c)


@pytest.mark.parametrize("method", [LISTS, HASHED, LEAN, DEFAULT], ids=["lists", "hashed", "lean", "default"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_methods_as_on_the_cpu(method, head_dim, group, causal):
    """The same lists, read by both kernels: chosen once, on the GPU."""
    from hyperattention.problem import Problem

    x = tensors(3001, heads=group, kv_heads=1, head_dim=head_dim, value_dim=64, dtype=torch.bfloat16)
    problem = Problem(*on_gpu(x), head_dim**-0.5, causal=causal)
    for tiling, selection in method.selections(problem):
        q, k, v = tiling.arrange(problem.q), problem.k.flatten(0, 1), problem.v.flatten(0, 1)
        ours = list_attention(q, k, v, selection, problem.scale)
        wide = list_attention(*(t.double() for t in (q, k, v)), selection, problem.scale)
        plain = list_attention(*(t.cpu() for t in (q, k, v)), _to(selection, "cpu"), problem.scale)
        assert_same_math(ours[0].cpu(), wide[0].cpu(), plain[0])
        assert_exact(ours[1], wide[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim"), [(4, 128), (16, 64), (2, 256)])
def test_sorted_rows_are_moved_and_merged_as_in_torch(monkeypatch, group, head_dim, dtype):
    """The lists of the default, and the gradients of attention through them."""
    from hyperattention.select import alike

    x = on_gpu(tensors(3001, heads=2 * group, kv_heads=2, head_dim=head_dim, dtype=dtype))
    options = {"is_causal": True, "enable_gqa": True, "method": DEFAULT}
    ours = attend_and_differentiate(lambda *y: with_lse(*y, **options), x)
    # the same lists, which the kernels choose: rows moved and merged by operators of PyTorch
    monkeypatch.setattr(alike, "triton_reads", lambda *tensors: False)
    plain = attend_and_differentiate(lambda *y: with_lse(*y, **options), x)
    # a rounding step of each of two results and a sum, in the order of atomic additions
    steps = 4 * max(torch.finfo(dtype).eps, 1e-5)
    for a, b in zip(ours, plain, strict=True):
        assert_close_where_finite(a, b, steps)


def assert_close_where_finite(a: Tensor, b: Tensor, steps: float) -> None:
    """Both have the same holes, and differ by no more than some steps of the largest number."""
    assert torch.equal(torch.isfinite(a), torch.isfinite(b))
    a, b = (torch.nan_to_num(t.float(), neginf=0.0) for t in (a, b))
    assert (a - b).abs().max() <= steps * b.abs().max()


@pytest.mark.parametrize("num_tokens", [2048, 8192])
@pytest.mark.parametrize(("tile", "group", "width", "dtype"), [
    (64, 4, 128, torch.bfloat16), (16, 4, 128, torch.bfloat16), (32, 4, 128, torch.float16), (64, 1, 64, torch.bfloat16),
    (64, 2, 256, torch.bfloat16), (64, 4, 96, torch.bfloat16), (64, 4, 128, torch.float32),
], ids=str)  # fmt: skip
def test_the_fast_list_kernel(tile, group, width, dtype, num_tokens):
    """At real shapes: every shape of a program, keys that end within a tile, rows beside float64 and the general kernel."""
    from hyperattention.kernels.list import triton_choice, triton_forward
    from hyperattention.kernels.list.operator import fields
    from hyperattention.kernels.list.reference import Lists
    from hyperattention.problem import Problem

    method = ha.Method(ha.Sinks(16), ha.Window(256), ha.Draw(688), tile=tile)
    x = tensors(num_tokens - 5, batch=2, heads=8 * group, kv_heads=8, head_dim=width, dtype=dtype)
    problem = Problem(*on_gpu(x), width**-0.5, causal=True)
    tiles, selection = method.select(problem)
    lists, q, (k, v) = Lists(*fields(selection)), tiles.split(problem.q), (x.flatten(0, 1) for x in (problem.k, problem.v))
    assert triton_choice.flat_form_for(q, k, v, lists) is not None
    ours = triton_choice.forward(q, k, v, lists, problem.scale)
    plain = triton_forward.forward(q, k, v, lists, problem.scale)
    wide = list_attention(*(t.double() for t in (q, k, v)), selection, problem.scale)
    for a, b, c in zip(ours, wide, plain, strict=True):
        assert_same_math(a, b, c)


@pytest.mark.parametrize(("group", "width", "dtype"), [
    (4, 128, torch.bfloat16), (1, 64, torch.float16), (2, 256, torch.bfloat16), (4, 128, torch.float32),
], ids=str)  # fmt: skip
def test_lists_that_are_read_as_they_lie(group, width, dtype):
    """Those of the default method, beside float64 and the general kernel: few keys left, and many."""
    from hyperattention.kernels.list import triton_choice, triton_forward
    from hyperattention.kernels.list.operator import fields
    from hyperattention.kernels.list.reference import Lists
    from hyperattention.problem import Problem

    x = tensors(4096 - 5, batch=2, heads=8 * group, kv_heads=8, head_dim=width, dtype=dtype)
    problem = Problem(*on_gpu(x), width**-0.5, causal=True)
    for tiles, selection in DEFAULT.selections(problem):
        lists, q, (k, v) = (
            Lists(*fields(selection)),
            tiles.split(problem.q),
            (x.flatten(0, 1) for x in (problem.k, problem.v)),
        )
        form = triton_choice.flat_form_for(q, k, v, lists)
        assert form is not None
        assert not form.to_lay_out
        ours = triton_choice.forward(q, k, v, lists, problem.scale)
        plain = triton_forward.forward(q, k, v, lists, problem.scale)
        wide = list_attention(*(t.double() for t in (q, k, v)), selection, problem.scale)
        for a, b, c in zip(ours, wide, plain, strict=True):
            assert_same_math(a, b, c)


def _to(x, device: str):
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, tuple):
        return tuple(_to(t, device) for t in x)
    if hasattr(x, "__dataclass_fields__"):
        return type(x)(**{name: _to(getattr(x, name), device) for name in x.__dataclass_fields__})
    return x


COMPILED = """
import torch
import hyperattention as ha
method = ha.default_method(10**6, device="cuda")
torch.manual_seed(0)
q, k, v = (torch.randn(1, heads, 5000, 64, device="cuda") for heads in (4, 2, 2))
def attend(q, k, v):
    result = ha.measured_attention(q, k, v, is_causal=True, enable_gqa=True, method=method)
    return result.out, result.lse
results = []
for step in (attend, torch.compile(attend, fullgraph=True)):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = step(*leaves)
    results.append([out.detach(), lse.detach(), *torch.autograd.grad((out ** 2).sum() + lse.sum(), leaves)])
# atomic additions come in any order, and fused estimates may move a draw
print(max(((a - b).norm() / b.norm()).item() for a, b in zip(*results)) < 1e-2)
"""


def test_compiles_into_one_graph(run_python):
    assert run_python(COMPILED).split() == ["True"]


@pytest.mark.parametrize("method", [LISTS, HASHED, LEAN, DEFAULT], ids=["lists", "hashed", "lean", "default"])
def test_a_graph_captures_a_whole_call(method):
    """Nothing waits for the device: capture would fail."""
    x = on_gpu(tensors(5000, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16))

    def attend():
        return with_lse(*x, is_causal=True, enable_gqa=True, method=method)

    expected = attend()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            attend()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for a in captured:
        a.fill_(torch.nan)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_recomputes_the_same_bits():
    from torch.utils.checkpoint import checkpoint

    def attend(*x):
        return with_lse(*x, is_causal=True, method=DEFAULT)

    x = on_gpu(tensors(5000, head_dim=64))
    torch.use_deterministic_algorithms(True)
    try:
        plain = attend_and_differentiate(attend, x)
        again = attend_and_differentiate(lambda *y: checkpoint(attend, *y, use_reentrant=False), x)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(again, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_elsewhere_than_on_the_current_device():
    x = on_gpu(tensors(5000, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16))
    options = {"is_causal": True, "enable_gqa": True, "method": DEFAULT}
    here, there = (ha.attention(*(t.to(device) for t in x), **options) for device in ("cuda:0", "cuda:1"))
    assert torch.equal(here.cpu(), there.cpu())


def test_addresses_beyond_two_to_the_31():
    """Values of one head that lie further than 2**31 numbers apart."""
    wide = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    k = wide[-(2**20) :].view(1, 1, -1, 64)
    far = wide.as_strided((2, k.shape[2], 64), (2**31, 64, 1))
    k.normal_()
    q = torch.randn(1, 2, 1000, 64, dtype=torch.bfloat16, device="cuda")
    ours = ha.attention(q, far[None], far[None], method=ha.Method(ha.Sinks(4), ha.Draw(64)))
    near = ha.attention(q, far[None].clone(), far[None].clone(), method=ha.Method(ha.Sinks(4), ha.Draw(64)))
    assert torch.equal(ours, near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pages(dtype):
    from test_paged import apart, make_cache

    counts = [1, 24, 700, 1]
    alone, arguments = make_cache([4000, 870, 1000, 33], counts, dtype=dtype)
    out = ha.paged_attention(*on_gpu(arguments[:4]), *arguments[4:])
    for (q, k, v), o in zip(alone, apart(out.cpu(), counts), strict=True):
        assert_same_math(o, *(f(q, k, v, causal=True, align="lower_right")[0] for f in (dense.reference, dense.attention)))


def test_an_audit_judges_in_float32():
    q, k, v = on_gpu(tensors(3000, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16))
    out = ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=LISTS)
    options = {"rows": 64, "is_causal": True, "enable_gqa": True}
    alone = ha.audit(q, k, v, out, **options, hardness=False)
    wide = ha.audit(*(x.double() for x in (q, k, v, out)), **options)
    # a difference of outputs in bfloat16, relative to rows that float32 sums over 3,000 keys in another order
    assert torch.allclose(alone.relative_error.double(), wide.relative_error, rtol=1e-3)
