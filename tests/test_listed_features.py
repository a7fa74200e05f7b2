"""Attention over listed keys with products of features: equal to all pairs written out, and its gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits
from hyperattention.kernels.list.operator import fields
from hyperattention.kernels.listed_features.operator import listed_features
from hyperattention.problem import Problem
from problems import problem

METHODS = {
    "blocks": ha.Method(ha.TopBlocks(2, block_size=8), tile=16),
    "window and blocks": ha.Method(ha.Sinks(2), ha.Window(8), ha.TopBlocks(2, block_size=8), tile=16),
    "buckets": ha.Method(ha.Sinks(2), ha.Window(8), ha.HashBuckets(8), ha.TopBlocks(1, block_size=8), tile=16),
}
FEATURES = 5
every_support = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


def features(asked: Problem, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Positive features of queries and keys, and log scales of the keys."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((*asked.q.shape[:3], FEATURES), (*asked.k.shape[:3], FEATURES), asked.k.shape[:3])
    phi, psi, scale = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return phi.exp(), psi.exp(), 3 * scale


def attend(method: ha.Method, asked: Problem, phi: Tensor, psi: Tensor, scale: Tensor, v: Tensor) -> list[tuple]:
    """Rows and lse of every tiling, in the order of the queries."""
    with torch.no_grad():
        selected = method.selections(asked)
    found = []
    for tiling, selection in selected:
        out, lse = listed_features(tiling.arrange(phi), *(x.flatten(0, 1) for x in (psi, v, scale)), selection)
        found.append((tiling.restore(out), tiling.restore(lse)))
    return found


def merged(parts: list[tuple]) -> tuple[Tensor, Tensor]:
    whole = ha.merge([ha.Partial(*part) for part in parts])
    return whole.out, whole.lse


def written_out(method: ha.Method, asked: Problem, phi: Tensor, psi: Tensor, scale: Tensor, v: Tensor) -> tuple:
    """All pairs in float64; weights of pairs that are not listed are 0."""
    listed = dense.weights(method, asked)
    psi, scale, v = (x.repeat_interleave(asked.group, 1) for x in (psi, scale, v))
    weight = (phi @ psi.transpose(2, 3)) * scale[:, :, None].exp() * listed.to(phi)
    total = weight.sum(-1)
    out = weight @ v / total.masked_fill(total == 0, 1.0)[..., None]
    return out, total.log()


@every_support
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_attends_as_the_lists_say(method, causal, dtype):
    asked = problem(60, causal=causal, heads=4)
    phi, psi, scale = features(asked)
    ours = merged(attend(method, asked, *(x.to(dtype) for x in (phi, psi, scale, asked.v))))
    truth = written_out(method, asked, *(x.double() for x in (phi, psi, scale, asked.v)))
    for x, y in zip(ours, truth, strict=True):
        assert x.dtype == dtype
        assert_exact(x, y.to(dtype) if dtype == torch.float32 else y)


@every_support
def test_gradcheck(method):
    asked = problem(20, heads=2, kv_heads=1, head_dim=2, value_dim=2)
    leaves = [x.detach().requires_grad_() for x in (*features(asked, torch.float64), asked.v.double())]

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = merged(attend(method, asked, *x))
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    # in random directions: one derivative at a time would be a thousand calls
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_products_that_underflow_have_no_weight_and_no_gradient():
    asked, method = problem(16, heads=1, kv_heads=1), METHODS["blocks"]
    phi, psi, scale = (x.requires_grad_() for x in features(asked))
    tiny = psi * torch.where(torch.arange(16) == 3, 1e-40, 1.0)[None, None, :, None]
    out, lse = merged(attend(method, asked, 1e-30 * phi, tiny, scale, asked.v))
    assert torch.isfinite(out).all()
    gradients = torch.autograd.grad(out.sum() + lse.sum(), (phi, psi, scale))
    assert all(torch.isfinite(x).all() for x in gradients)
    assert not gradients[2][0, 0, 3].any()


def test_rows_without_a_listed_key_are_empty():
    asked, method = problem(40, heads=2), ha.Method(ha.Sinks(2), ha.Window(8), ha.TopBlocks(1, block_size=8), tile=16)
    (tiles, selection), *_ = method.selections(asked)
    (*_, blocks) = selection.runs
    phi, psi, scale = features(asked)
    parts = (x.flatten(0, 1) for x in (psi, asked.v, scale))
    out, lse = listed_features(tiles.arrange(phi), *parts, replace(selection, runs=(blocks,)))
    # the first tile sees only keys that sinks and window took
    assert_same_bits(lse[:, 0], torch.full_like(lse[:, 0], -torch.inf))
    assert_same_bits(out[:, 0], torch.zeros_like(out[:, 0]))
    assert torch.isfinite(lse[:, 2, :8]).all()


def test_second_derivatives_and_vmap_are_refused():
    asked, method = problem(16, heads=1, kv_heads=1), METHODS["blocks"]
    phi, psi, scale = features(asked)
    phi.requires_grad_()
    out, _ = merged(attend(method, asked, phi, psi, scale, asked.v))
    (grad,) = torch.autograd.grad(out.square().sum(), phi, create_graph=True)
    with pytest.raises(NotImplementedError, match="features of listed keys"):
        grad.sum().backward()


def test_what_compilers_are_told_of_the_operators_is_true():
    asked, method = problem(20, heads=2, kv_heads=1), METHODS["window and blocks"]
    phi, psi, scale = (x.requires_grad_() for x in features(asked))
    (tiles, selection), *_ = method.selections(asked)
    args = (tiles.arrange(phi), *(x.flatten(0, 1) for x in (psi, asked.v, scale)))
    out, lse = listed_features(*args, selection)
    lists = fields(selection)
    operators = torch.ops.hyperattention
    torch.library.opcheck(operators.listed_features.default, (*(x.detach() for x in args), *lists))
    backward = (torch.ones_like(out), torch.ones_like(lse), *args, out, lse, *lists)
    with torch.no_grad():
        torch.library.opcheck(
            operators.listed_features_backward.default, backward, test_utils=("test_schema", "test_faketensor")
        )
