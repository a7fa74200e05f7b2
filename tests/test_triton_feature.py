"""The feature kernel's Triton form, in the interpreter: which calls it serves, and that it computes what PyTorch's does."""

import pytest
import torch

from assertions import assert_same_bits, assert_same_math
from hyperattention.kernels.feature import operator
from hyperattention.kernels.feature.operator import feature_attention

pytestmark = pytest.mark.usefixtures("triton_kernel")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POWERS = pytest.mark.parametrize("power", [1, 2])


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


@pytest.fixture
def in_pytorch(monkeypatch):
    """Run a function on the PyTorch kernel."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(operator, "triton_reads", lambda *tensors: False)
            return function()

    return run


def make(queries, keys, dtype, *, spread=1.0, features=5):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, queries), (1, 2, keys)
    query, key = (torch.rand((*shape, features), generator=generator) + 0.05 for shape in shapes)
    value = torch.randn((1, 2, keys, 3), generator=generator)
    scales = (spread * (2 * torch.rand(shape, generator=generator) - 1) for shape in shapes)
    return tuple(x.to(dtype) for x in (query, key, value, *scales))


def both(tensors, **options):
    """Outputs and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = feature_attention(*leaves[:3], query_log_scale=leaves[3], key_log_scale=leaves[4], **options)
    ramp = torch.linspace(0.5, 2, out.numel()).view(out.shape).to(out)
    alive = lse > -torch.inf
    total = (out * ramp).sum() + (lse[alive] * ramp.float().mean(-1)[alive]).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)


def assert_same_as_pytorch(tensors, in_pytorch, **options):
    ours = both(tensors, **options)
    truth = in_pytorch(lambda: both([x.double() for x in tensors], **options))
    plain = in_pytorch(lambda: both(tensors, **options))
    for x, y, z in zip(ours, truth, plain, strict=True):
        assert_same_math(x, y, z)


@POWERS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_rows_and_gradients_are_those_of_the_pytorch_kernel(dtype, power, launched, in_pytorch):
    assert_same_as_pytorch(make(50, 50, dtype), in_pytorch, is_causal=True, power=power)
    states = ["_states_kernel", "_scan_kernel", "_scan_kernel"]
    assert launched == [*states, "_forward_kernel", *states, *states, "_slopes_kernel", "_slopes_kernel"]


@POWERS
@pytest.mark.parametrize(
    ("queries", "keys", "options"),
    [
        (40, 50, {}),
        (40, 50, {"first_key": 3}),
        # the last rows of a prompt; rows behind the last key; rows before the first one
        (20, 50, {"is_causal": True, "first_query": 30}),
        (40, 36, {"is_causal": True, "first_query": 40}),
        (40, 36, {"is_causal": True, "first_query": 3, "first_key": 9}),
        (1, 1, {"is_causal": True}),
    ],
    ids=str,
)
def test_other_rows(queries, keys, options, power, launched, in_pytorch):
    assert_same_as_pytorch(make(queries, keys, torch.float32), in_pytorch, power=power, **options)
    assert launched


@POWERS
def test_huge_log_scales(power, in_pytorch):
    tensors = make(50, 50, torch.float32, spread=500.0)
    # the first rows see small scales alone, later keys of their tile and chunk have large ones
    tensors[4][..., :5] = -500.0
    scales = dict(zip(("query_log_scale", "key_log_scale"), tensors[3:], strict=True))

    def attend():
        return feature_attention(*tensors[:3], **scales, is_causal=True, power=power)

    wide = [x.double() for x in tensors]
    truth = feature_attention(*wide[:3], query_log_scale=wide[3], key_log_scale=wide[4], is_causal=True, power=power)
    for x, y, z in zip(attend(), truth, in_pytorch(attend), strict=True):
        # a base is rounded as logarithms of this size are, by the kernel in one place more
        assert_same_math(x, y, z + (500 * torch.finfo(torch.float32).eps if z.ndim == 3 else 0.0))
    assert all(x.isfinite().all() for x in both(tensors, is_causal=True, power=power))


def test_rows_without_a_denominator_are_empty_and_have_no_gradient():
    query, key, value, *scales = make(20, 20, torch.float32)
    query[:, :, 3] = -1.0
    scales[0][:, :, 5], scales[1][:, :, :2] = -torch.inf, -torch.inf
    out, lse, *grads = both((query, key, value, *scales), is_causal=True)
    dead = torch.tensor([0, 1, 3, 5])
    assert_same_bits(out[:, :, dead], torch.zeros_like(out[:, :, dead]))
    assert (lse[:, :, dead] == -torch.inf).all()
    assert lse.isfinite().sum() == lse.numel() - 4 * len(dead)
    assert not grads[0][:, :, dead].any()
    assert all(x.isfinite().all() for x in grads)
    assert not grads[1][:, :, :2].any()


def test_nan_shows_from_its_own_tile_of_rows_on():
    query, key, value, *_ = make(50, 50, torch.float32)
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
