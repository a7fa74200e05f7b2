"""Attention over features on a GPU, at sizes too large for the interpreter: the Triton kernels beside PyTorch in float64."""

import pytest
import torch

from assertions import assert_same_bits, assert_same_math
from hyperattention.kernels.feature import operator
from hyperattention.kernels.feature.operator import feature_attention

pytestmark = pytest.mark.gpu


def both(tensors, **options):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = feature_attention(*leaves[:3], query_log_scale=leaves[3], key_log_scale=leaves[4], **options)
    ramp = torch.linspace(0.5, 2, out.numel(), device=out.device).view(out.shape).to(out)
    return out.detach(), lse.detach(), *torch.autograd.grad((out * ramp).sum() + lse.mean(), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("power", "features", "value_dim"), [(1, 64, 64), (1, 100, 128), (2, 32, 64), (2, 20, 72)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "first_query": 700}], ids=str)
def test_kernels_are_those_of_pytorch(power, features, value_dim, dtype, options, monkeypatch):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (2, 8, 3001), (2, 2, 3500)

    def draw(*shape):
        return torch.rand(shape, generator=generator, device="cuda")

    query, key = (draw(*shape, features) / features for shape in shapes)
    tensors = [query, key, draw(*shapes[1], value_dim) - 0.5, *(draw(*shape) * 4 for shape in shapes)]
    tensors = [x.to(dtype) for x in tensors]
    results = both(tensors, power=power, **options)
    for x, y in zip(results, both(tensors, power=power, **options), strict=True):
        assert_same_bits(x, y)
    truth = both([x.double() for x in tensors], power=power, **options)
    monkeypatch.setattr(operator, "triton_reads", lambda *tensors: False)
    plain = both(tensors, power=power, **options)
    for x, y, z in zip(results, truth, plain, strict=True):
        # states and weights are rounded to the dtype, which PyTorch's kernel does to results alone
        rounded = z if dtype == torch.float32 else z + torch.finfo(dtype).eps * y.abs().max().to(z.dtype)
        assert_same_math(x, y, rounded)
