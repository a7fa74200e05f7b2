"""The feature kernel's Triton form, in the interpreter: which calls it serves, and that it computes what PyTorch's does."""

from dataclasses import replace

import pytest
import torch

import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_same_math
from hyperattention.kernels.feature import operator
from hyperattention.kernels.feature.operator import feature_attention
from hyperattention.nn import PolySketchAttention
from problems import problem

pytestmark = pytest.mark.usefixtures("triton_kernel")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def launched(monkeypatch, triton_kernel) -> list[str]:
    """Let the kernels read CPU tensors in small programs; names of those launched, in order."""
    from hyperattention.kernels.feature import triton_backward, triton_forward
    from hyperattention.kernels.feature.triton_states import Cut
    from hyperattention.kernels.launch import Launch

    monkeypatch.setattr(operator, "triton_reads", lambda *tensors: all(x.dtype != torch.float64 for x in tensors))
    for module in (triton_forward, triton_backward):
        # several tiles a chunk, several blocks a tile
        monkeypatch.setattr(module, "cut_of", lambda *sizes: Cut(chunk=32, tile=16, block=16, piece=2, warps=4, stages=1))
    names, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: names.append(self.kernel.__name__) or run(self))
    return names


def make(queries, keys, dtype, *, spread=1.0, features=5):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 2, queries), (1, 1, keys)
    query, key = (torch.rand((*shape, features), generator=generator) + 0.05 for shape in shapes)
    value = torch.randn((1, 1, keys, 3), generator=generator)
    scales = (spread * (2 * torch.rand(shape, generator=generator) - 1) for shape in shapes)
    return tuple(x.to(dtype) for x in (query, key, value, *scales))


def ours(query, key, value, query_scale, key_scale, **options):
    return feature_attention(query, key, value, query_log_scale=query_scale, key_log_scale=key_scale, **options)


def dense(query, key, value, query_scale, key_scale, *, power=1, is_causal=False, first_query=0, first_key=0):
    """The definition, with all pairs, in the dtype of the input."""
    key_at, query_at = (torch.arange(x.shape[2]) for x in (key, query))
    hidden = key_at < first_key if not is_causal else (key_at > query_at[:, None] + first_query) | (key_at < first_key)
    logs = (query_scale[..., None] + key_scale[:, :, None]).masked_fill(hidden, -torch.inf)
    top = logs.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weight = (query @ key.transpose(2, 3)) ** power * (logs - top).exp()
    total = weight.sum(-1, keepdim=True)
    alive = total > 0
    total = total.masked_fill(~alive, 1.0)
    lse = (top + total.log()).masked_fill(~alive, -torch.inf)
    return (weight / total) @ value, lse[..., 0]


def both(function, tensors, **options):
    """Outputs and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = function(*leaves, **options)
    ramp = torch.linspace(0.5, 2, out.numel()).view(out.shape).to(out)
    alive = lse > -torch.inf
    total = (out * ramp).sum() + (lse[alive] * ramp.to(lse).mean(-1)[alive]).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)


def assert_right(tensors, **options):
    results, truth = (both(f, x, **options) for f, x in ((ours, tensors), (dense, [x.double() for x in tensors])))
    plain = list(both(dense, tensors, **options))
    # lse is float32 at least, so that it is judged against plain PyTorch in float32
    plain[1] = dense(*(x.float() for x in tensors), **options)[1]
    for x, y, z in zip(results, truth, plain, strict=True):
        assert_same_math(x, y, z)


@pytest.mark.parametrize(
    ("dtype", "power"),
    [
        (torch.float32, 1),
        (torch.bfloat16, 2),
        *(pytest.param(dtype, 1, marks=pytest.mark.heavy) for dtype in DTYPES[1:]),
        *(pytest.param(dtype, 2, marks=pytest.mark.heavy) for dtype in (torch.float32, torch.float16)),
    ],
    ids=str,
)
def test_causal_rows_and_gradients(dtype, power, launched):
    assert_right(make(40, 40, dtype), is_causal=True, power=power)
    states = ["_states_kernel", "_scan_kernel", "_scan_kernel"]
    assert launched == [*states, "_forward_kernel", *states, *states, "_slopes_kernel", "_slopes_kernel"]


@pytest.mark.parametrize(
    ("queries", "keys", "options"),
    [
        (20, 40, {"first_key": 3, "power": 2}),
        # rows behind the last key, in another chunk; rows before the first one
        (20, 36, {"is_causal": True, "first_query": 60}),
        (30, 36, {"is_causal": True, "first_query": 3, "first_key": 9, "power": 2}),
        (1, 1, {"is_causal": True}),
        # the last rows of a prompt
        pytest.param(20, 50, {"is_causal": True, "first_query": 30, "power": 2}, marks=pytest.mark.heavy),
        pytest.param(40, 50, {}, marks=pytest.mark.heavy),
    ],
    ids=str,
)
def test_other_rows(queries, keys, options, launched):
    assert_right(make(queries, keys, torch.float32), **options)
    assert launched


@pytest.mark.parametrize(("queries", "keys", "first_query"), [(8, 70, 62), (70, 8, 0)])
def test_states_of_several_chunks_of_unlike_scales(queries, keys, first_query):
    tensors = make(queries, keys, torch.float32, spread=4.0)
    # the scale of what is summed first differs from that of the rest, for the keys and, backward, for the queries
    tensors[4][..., : keys // 2] -= 5.0
    tensors[0][..., queries // 2 :, :] *= 30.0
    options = {"is_causal": True, "first_query": first_query}
    truth = both(dense, [x.double() for x in tensors], **options)
    for x, y in zip(both(ours, tensors, **options), truth, strict=True):
        assert_exact(x, y)


@pytest.mark.parametrize("power", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_huge_log_scales(power):
    tensors = make(40, 40, torch.float32, spread=500.0)
    # the first rows see small scales alone, later keys of their tile and chunk have large ones
    tensors[4][..., :5] = -500.0
    options = {"is_causal": True, "power": power}
    truth, plain = dense(*(x.double() for x in tensors), **options), dense(*tensors, **options)
    results = both(ours, tensors, **options)
    for x, y, z in zip(results, truth, plain, strict=False):
        assert_same_math(x, y, z)
    assert all(x.isfinite().all() for x in results)


def test_rows_without_a_denominator_are_empty_and_have_no_gradient():
    query, key, value, *scales = make(20, 20, torch.float32)
    query[:, :, 3] = -1.0
    scales[0][:, :, 5], scales[1][:, :, :2] = -torch.inf, -torch.inf
    out, lse, *grads = both(ours, (query, key, value, *scales), is_causal=True)
    dead = torch.tensor([0, 1, 3, 5])
    assert_same_bits(out[:, :, dead], torch.zeros_like(out[:, :, dead]))
    assert (lse[:, :, dead] == -torch.inf).all()
    assert lse.isfinite().sum() == lse.numel() - 2 * len(dead)
    assert not grads[0][:, :, dead].any()
    assert all(x.isfinite().all() for x in grads)
    assert not grads[1][:, :, :2].any()


def test_nan_shows_from_its_own_tile_of_rows_on():
    query, key, value, *_ = make(40, 40, torch.float32)
    clean = feature_attention(query, key, value, is_causal=True)[0]
    key[:, :, 20] = torch.nan
    out = feature_attention(query, key, value, is_causal=True)[0]
    assert out[:, :, 20:].isnan().all()
    assert_same_bits(out[:, :, :16], clean[:, :, :16])


def test_limits_of_each_row_and_mixed_dtypes_are_left_to_pytorch(launched):
    query, key, value, *_ = make(20, 20, torch.float32)
    feature_attention(query, key, value, row_limit=torch.arange(1, 21)[None])
    feature_attention(query.bfloat16(), key, value)
    feature_attention(*(torch.cat([x] * 30, -1) for x in (query, key, value)))
    assert launched == []
    feature_attention(query, key, value)
    assert launched


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("stages", "served"),
    [
        ((), True),
        ((ha.Sinks(4),), True),
        # a listed key is subtracted in PyTorch, but the whole is a sum over declared rows
        ((ha.Sinks(4), ha.TopBlocks(1, block_size=8)), True),
        ((ha.Window(16),), False),
    ],
    ids=str,
)
def test_which_kernel_runs_scatterbrain(stages, served, causal, launched):
    asked = problem(64, heads=2, causal=causal, dtype=torch.float32)
    method = ha.Scatterbrain(*stages, num_features=8, tile=16)
    out = method.attend(asked).out
    assert ("_forward_kernel" in launched) == served
    truth = method.attend(replace(asked, q=asked.q.double(), k=asked.k.double(), v=asked.v.double())).out
    assert_exact(out, truth, size=4.0)


@pytest.mark.parametrize("local", [True, False])
def test_which_kernel_runs_a_layer_of_sketches(local, launched):
    layer = PolySketchAttention(16, 2, sketch_size=8, block=8, local=local)
    layer(torch.randn(1, 24, 16))
    assert ("_forward_kernel" in launched) != local
