"""Rows of sorted tiles as a GPU moves and merges them: what PyTorch does, forward and backward."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from assertions import assert_same_bits, assert_same_math
from hyperattention.kernels.list.operator_sorted import merge_rows, sort_rows
from hyperattention.merge import merge
from hyperattention.problem import Problem
from hyperattention.select import alike as alike_module
from hyperattention.select.alike import AlikeTiles, sort_alike
from hyperattention.tiling import cut
from hyperattention.types import Partial
from problems import problem

pytestmark = pytest.mark.usefixtures("triton_kernel")
CASES = {
    "whole tiles": (problem(64, heads=4, kv_heads=2, head_dim=16), 0),
    "padding, a batch": (problem(75, heads=3, kv_heads=1, head_dim=20, batch=2), 0),
    "a chunk": (problem(90, heads=2, kv_heads=2, head_dim=64), 37),
    "one query": (problem(1, heads=1, kv_heads=1, head_dim=8), 0),
}


def lists_of(case: str) -> tuple[Problem, AlikeTiles]:
    given, offset = CASES[case]
    given = replace(given, q=given.q[:, :, offset:], offset=offset)
    return given, sort_alike(cut(given, 32), 3)[0]


def partials(given: Problem, alike: AlikeTiles, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows in both orders with their log-sum-exps; some that saw no key on one side, and one on neither."""
    draws = torch.Generator().manual_seed(0)
    out, rows = (torch.randn(*shape, 24, generator=draws) for shape in (given.q.shape[:3], alike.source.shape))
    lse = 3 * torch.randn(given.q.shape[:3], generator=draws)
    rows_lse = 3 * torch.randn(alike.source.shape, generator=draws)
    lse[:, :, 1::5], rows_lse[alike.source % given.num_queries % 7 == 1] = -torch.inf, -torch.inf
    # as the list kernel leaves them
    out = out.masked_fill((lse == -torch.inf)[..., None], 0.0)
    rows = rows.masked_fill((rows_lse == -torch.inf)[..., None], 0.0)
    return out.to(dtype), lse, rows.to(dtype), rows_lse


def with_gradients(merged, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out, lse = merged(*leaves)
    ramp = torch.linspace(0.5, 2, out.numel()).view(out.shape)
    loss = (out * ramp).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * ramp[..., 0]).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("case", CASES)
def test_rows_are_sorted_and_their_gradients_brought_back(case):
    given, alike = lists_of(case)
    # by token in memory, as projections leave them
    q = given.q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    rows = sort_rows(q, alike.source, alike.live)
    assert_same_bits(rows.detach(), alike.arrange(given.q))
    weight = torch.linspace(0.5, 2, rows.numel()).view(rows.shape)
    (ours,) = torch.autograd.grad((rows * weight).sum(), q)
    # padding rows read no key, so that their gradient counts for nothing
    assert_same_bits(ours, alike.restore(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_merged_rows_and_gradients_are_those_of_torch(case, dtype):
    given, alike = lists_of(case)
    tensors = partials(given, alike, dtype)

    def in_torch(out: Tensor, lse: Tensor, rows: Tensor, rows_lse: Tensor) -> tuple[Tensor, Tensor]:
        # a row more of no meaning, so that `restore` keeps the rows' dtype and width
        both = merge([Partial(out, lse), Partial(alike.restore(rows), alike.restore(rows_lse))])
        return both.out, both.lse

    def fused(out: Tensor, lse: Tensor, rows: Tensor, rows_lse: Tensor) -> tuple[Tensor, Tensor]:
        return merge_rows(out, lse, (rows, rows_lse), alike.source, alike.live)

    ours, plain = (with_gradients(each, tensors) for each in (fused, in_torch))
    truth = with_gradients(in_torch, tuple(x.double() for x in tensors))
    assert (ours[1] == -torch.inf).any() == (truth[1] == -torch.inf).any()
    for a, b, c in zip(ours, truth, plain, strict=True):
        assert a.dtype == c.dtype
        assert_same_math(a, b, c)


def test_a_method_merges_in_one_launch(monkeypatch):
    """The path of a GPU: the same rows as in PyTorch, whatever the layout of what was attended first."""
    given, alike = lists_of("padding, a batch")
    out, lse, rows, rows_lse = partials(given, alike, torch.float32)
    earlier = (Partial(out.transpose(1, 2).contiguous().transpose(1, 2), lse.transpose(1, 2).contiguous().transpose(1, 2)),)
    expected = merge(alike.beside(earlier, rows[:, :, None], rows_lse[:, :, None]))
    calls = []
    monkeypatch.setattr(alike_module, "triton_reads", lambda *tensors: calls.append(len(tensors)) or True)
    (merged,) = alike.beside(earlier, rows[:, :, None], rows_lse[:, :, None])
    assert calls == [2]
    torch.testing.assert_close(merged.out, expected.out)
    torch.testing.assert_close(merged.lse, expected.lse)
    assert_same_bits(alike.arrange(given.q), sort_rows(given.q, alike.source, alike.live))
