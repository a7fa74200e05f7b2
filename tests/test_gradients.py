"""Gradients: those of the forward pass with the selection held fixed, and none from rows that see nothing."""

import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_same_math
from cases import CONTROL
from front_door import attend, every_method, padded
from problems import tensors


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients(method, dtype):
    live = padded("left")
    leaves = [x.requires_grad_() for x in tensors(30, batch=2, heads=4, dtype=dtype)]
    options = {"is_causal": True, "key_mask": live}

    def gradients(out: Tensor, lse: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        ramp = torch.linspace(-1, 2, out.numel()).view(out.shape).to(out)
        return torch.autograd.grad((out * ramp).sum() + (lse[lse > -torch.inf] ** 2).sum(), leaves)

    ours = gradients(*attend(*leaves, method, **options), leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = gradients(*dense.attention(*wide, causal=True, key_mask=live), wide)
    plain = gradients(*dense.attention(*leaves, causal=True, key_mask=live), leaves)
    for x, y, z in zip(ours, truth, plain, strict=True):
        assert_same_math(x, y, z)
    # the queries of the padded row's first tokens see nothing
    assert_same_bits(ours[0][1, :, :11], torch.zeros_like(ours[0][1, :, :11]))


def test_gradients_hold_the_selection_fixed():
    from hyperattention.problem import Problem

    leaves = [x.requires_grad_() for x in tensors(60, heads=4, dtype=torch.float64)]
    method = ha.Method(ha.Sinks(2), ha.Window(8), ha.TopBlocks(1, block_size=4), ha.Draw(5), tile=8)
    with torch.no_grad():
        frozen = dense.weights(method, Problem(*leaves, leaves[0].shape[-1] ** -0.5, causal=True, seed=1))
    assert (frozen > 1).any()
    ours, truth = attend(*leaves, method, is_causal=True, seed=1), dense.attention(*leaves, causal=True, weight=frozen)
    mine, expected = (torch.autograd.grad((out**2).sum() + (lse**2).sum(), leaves) for out, lse in (ours, truth))
    for x, y in zip(mine, expected, strict=True):
        # the weights' logarithms are float32
        assert_exact(x.float(), y.float())


def test_gradcheck_through_the_front_door():
    leaves = [x.requires_grad_() for x in tensors(9, heads=2, kv_heads=1, head_dim=2, value_dim=3, dtype=torch.float64)]
    method = ha.Method(ha.Sinks(1), ha.Window(2), ha.Draw(2), tile=2)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, method, is_causal=True), leaves)


@every_method
def test_rows_that_see_nothing_are_zero_and_send_no_gradient(method):
    q, k, v = (x.requires_grad_() for x in tensors(30, 12))
    out, lse = attend(q, k, v, method, is_causal=True, causal_align="lower_right")
    assert_same_bits(out[:, :, :18], torch.zeros_like(out[:, :, :18]))
    assert_same_bits(lse[:, :, :18], torch.full_like(lse[:, :, :18], -torch.inf))
    gradients = torch.autograd.grad(out[:, :, :18].sum(), (q, k, v), retain_graph=True)
    assert all(not gradient.any() for gradient in gradients)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_checkpointing_repeats_every_bit():
    from torch.utils.checkpoint import checkpoint

    tokens = tensors(70)

    def gradients(call) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tokens]
        out = call(lambda q, k, v: ha.attention(2 * q, k, v, is_causal=True, method=CONTROL, seed=2), *leaves)
        (out**2).sum().backward()
        return [out, *(x.grad for x in leaves)]

    plain = gradients(lambda f, *x: f(*x))
    # neither replays a random state: the draws are a function of the seed
    for reentrant in (True, False):
        again = gradients(lambda f, *x, r=reentrant: checkpoint(f, *x, use_reentrant=r, preserve_rng_state=False))
        for x, y in zip(again, plain, strict=True):
            assert_same_bits(x, y)
