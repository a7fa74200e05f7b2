"""What torch does to a call: autocast, the meta device, fake tensors, compilation."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from assertions import assert_same_bits
from front_door import assert_attends, attend, every_method
from problems import tensors


@every_method
def test_autocast_computes_in_its_dtype(method):
    q, k, v = tensors(30)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attend(q, k, v, method, is_causal=True)
        mixed, _ = attend(q, k, v.bfloat16(), method, is_causal=True)
        expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert_attends((out, lse), *(x.bfloat16() for x in (q, k, v)), causal=True)
    assert_same_bits(mixed, out)
    with torch.autocast("cpu", torch.bfloat16):
        wide = attend(q.double(), k.double(), v.double(), method, is_causal=True)[0]
    assert wide.dtype == torch.float64


@every_method
@pytest.mark.parametrize("masked", [False, True])
def test_the_meta_device_gives_shapes(method, masked):
    q, k, v = (x.to("meta") for x in tensors(40, 50, batch=2, heads=4, value_dim=5))
    options = {"key_mask": torch.ones(2, 50, dtype=torch.bool, device="meta")} if masked else {}
    out, lse = attend(q, k, v, method, is_causal=True, **options)
    assert out.device.type == "meta"
    assert (out.shape, lse.shape) == ((2, 4, 40, 5), (2, 4, 40))


@every_method
@pytest.mark.parametrize("masked", [False, True])
def test_fake_tensors_give_shapes(method, masked):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = torch.empty(2, 4, 40, 8), torch.empty(2, 2, 50, 8), torch.empty(2, 2, 50, 5)
        options = {"key_mask": torch.ones(2, 50, dtype=torch.bool)} if masked else {}
        out, lse = attend(q, k, v, method, is_causal=True, **options)
    assert (out.shape, lse.shape) == ((2, 4, 40, 5), (2, 4, 40))


COMPILED = """
import torch
import hyperattention as ha
lists = ha.Method(ha.Sinks(2), ha.Window(8), ha.TopBlocks(2, block_size=4), ha.Draw(4), tile=8)
torch.manual_seed(0)
# as models lay them out: tokens first
q, k, v = (torch.randn(2, 50, heads, 8).transpose(1, 2) for heads in (4, 2, 2))
live = torch.arange(50)[None] >= torch.tensor([[0], [9]])
for method, key_mask in ((None, None), (ha.default_method(10**6), None), (lists, live)):
    def attend(q, k, v):
        options = dict(is_causal=True, enable_gqa=True, key_mask=key_mask)
        result = ha.measured_attention(q, k, v, method=method, **options)
        return result.out, result.lse.masked_fill(result.lse == -torch.inf, 0.0)
    results = []
    for step in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = step(*leaves)
        results.append([out.detach(), lse.detach(), *torch.autograd.grad((out ** 2).sum() + lse.sum(), leaves)])
    print(max((a - b).abs().max().item() for a, b in zip(*results)) < 1e-5)
"""


@pytest.mark.heavy
def test_compiles_into_one_graph(run_python):
    assert run_python(COMPILED).split() == ["True"] * 3
