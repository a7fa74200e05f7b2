"""Merging partial results: the laws of a commutative monoid, and its gradients where nothing was seen."""

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_bits
from hyperattention.merge import merge
from hyperattention.types import Partial


def partial(scores: Tensor, values: Tensor) -> Partial:
    """Attention over some keys; -inf scores are keys not seen."""
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return Partial(weights @ values, lse)


@pytest.fixture
def parts() -> tuple[Tensor, Tensor, list[Partial]]:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(1, 2, 6, 9, generator=generator, dtype=torch.float64)
    scores[:, :, 0], scores[:, :, 1, :3], scores[:, :, 2, 3:] = -torch.inf, -torch.inf, -torch.inf
    values = torch.randn(1, 2, 9, 4, generator=generator, dtype=torch.float64)
    cuts = (slice(0, 3), slice(3, 5), slice(5, 9))
    return scores, values, [partial(scores[..., cut], values[:, :, cut]) for cut in cuts]


def assert_equal(ours: Partial, expected: Partial) -> None:
    assert_exact(ours.out, expected.out)
    assert_exact(ours.lse, expected.lse)


def test_parts_merge_to_the_whole(parts) -> None:
    scores, values, pieces = parts
    assert_equal(merge(pieces), partial(scores, values))


def test_associative_and_commutative(parts) -> None:
    a, b, c = parts[2]
    assert_equal(merge([merge([a, b]), c]), merge([a, merge([b, c])]))
    assert_equal(merge([a, b, c]), merge([c, a, b]))


def test_the_empty_partial_is_the_identity(parts) -> None:
    a = parts[2][0]
    nothing = Partial(torch.zeros_like(a.out), torch.full_like(a.lse, -torch.inf))
    assert_equal(merge([a, nothing]), a)
    assert_equal(merge([nothing, a]), a)
    assert_equal(merge([nothing, nothing]), nothing)


def test_scores_far_apart_do_not_overflow() -> None:
    ones = torch.ones(1, 1, 1, 1)
    merged = merge([Partial(ones, ones[..., 0] * 5000), Partial(3 * ones, ones[..., 0] * -5000)])
    assert_same_bits(merged.out, ones)
    assert_same_bits(merged.lse, ones[..., 0] * 5000)


def test_gradient_is_that_of_the_whole(parts) -> None:
    _, _, (a, b, c) = parts
    leaves = [x[:, :, 3:].clone().requires_grad_() for p in (a, b, c) for x in (p.out, p.lse)]

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        merged = merge([Partial(*x[i : i + 2]) for i in (0, 2, 4)])
        return merged.out, merged.lse

    assert torch.autograd.gradcheck(run, leaves)


def test_gradient_where_nothing_was_seen_is_zero() -> None:
    leaves = [x.requires_grad_() for x in (torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -torch.inf))]
    seen = Partial(torch.ones(1, 1, 2, 3), torch.tensor([[[0.0, -torch.inf]]]))
    merged = merge([Partial(*leaves), seen])
    (merged.out.sum() + merged.lse[0, 0, 0]).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert_same_bits(leaf.grad, torch.zeros_like(leaf))


def test_the_widest_dtype_is_kept() -> None:
    half = Partial(torch.ones(1, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 1))
    assert merge([half, half]).out.dtype == torch.bfloat16
    assert merge([half, Partial(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1))]).out.dtype == torch.float32
    assert merge([half]) is half


def test_refusals() -> None:
    a, b = (Partial(torch.ones(1, 1, n, 2), torch.zeros(1, 1, n)) for n in (1, 2))
    with pytest.raises(ValueError, match="at least one Partial"):
        merge([])
    with pytest.raises(ValueError, match="same queries"):
        merge([a, b])
