"""What is left of a partial result without some of its keys: merged with them again, it is the whole."""

import pytest
import torch

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits
from hyperattention.remainder import STEPS, remainder
from problems import tensors


def parts(cut: int, dtype: torch.dtype = torch.float32) -> tuple[ha.Partial, ha.Partial, ha.Partial]:
    """Attention over all of 20 keys, the first `cut`, and the others."""
    q, k, v = tensors(9, 20, dtype=dtype)
    return tuple(ha.Partial(*dense.attention(q, k[:, :, each], v[:, :, each])) for each in
                 (slice(None), slice(cut), slice(cut, None)))  # fmt: skip


@pytest.mark.parametrize("cut", [1, 10, 19])
def test_it_undoes_the_merge(cut):
    whole, part, others = parts(cut, torch.float64)
    left = remainder(whole, part)
    assert not left.clamped.any()
    # where few keys are left, their share of the whole is small, and rounding of the whole is large beside it
    size = (whole.lse - others.lse).exp().max().item() * whole.out.abs().max().item()
    assert_exact(left.partial.out, others.out, size=size)
    assert_exact(left.partial.lse, others.lse, size=size)


def test_gradients_are_those_of_the_others():
    leaves = [x.requires_grad_() for x in tensors(5, 8, heads=1, kv_heads=1, head_dim=2, value_dim=2, dtype=torch.float64)]

    def run(*x):
        q, k, v = x
        whole, part = (ha.Partial(*dense.attention(q, k[:, :, :n], v[:, :, :n])) for n in (8, 3))
        left = remainder(whole, part)
        return left.partial.out, left.partial.lse

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_rest_that_rounding_hides_is_clamped_to_nothing(dtype):
    eps = torch.finfo(dtype).eps
    # logs that differ by twice the limit, a half of it, nothing; a part that is larger than the whole; and one without keys
    lse = torch.full((1, 1, 5), -40.0, dtype=dtype)
    gap = torch.tensor([2.0, 0.5, 0.0, -4.0, torch.inf], dtype=dtype) * STEPS * eps * 40
    out = torch.ones(1, 1, 5, 3, dtype=dtype).requires_grad_()
    left = remainder(ha.Partial(out, lse), ha.Partial(torch.zeros_like(out), lse - gap))
    assert left.clamped.flatten().tolist() == [False, True, True, True, False]
    nothing = left.clamped
    assert (left.partial.lse[nothing] == -torch.inf).all()
    assert_same_bits(left.partial.out[nothing], torch.zeros_like(left.partial.out[nothing]))
    # the numerator is a difference as well: 1 / (1 - r)
    assert torch.isfinite(left.partial.out).all()
    assert_same_bits(left.partial.lse[..., 4], lse[..., 4])
    (gradient,) = torch.autograd.grad(left.partial.out.sum(), out)
    assert torch.isfinite(gradient).all()
    assert not gradient[nothing].any()


def test_nan_is_never_hidden_and_rows_without_keys_stay_empty():
    whole, part, _ = parts(5)
    lse = whole.lse.clone()
    lse[..., 0], lse[..., 1] = torch.nan, -torch.inf
    own = part.lse.clone()
    own[..., 1] = -torch.inf
    left = remainder(ha.Partial(whole.out, lse), ha.Partial(part.out, own))
    assert torch.isnan(left.partial.lse[..., 0]).all()
    assert torch.isnan(left.partial.out[..., 0, :]).all()
    assert (left.partial.lse[..., 1] == -torch.inf).all()
    assert not left.clamped[..., :2].any()
