"""Positive random features: unbiased for every pair, less noisy with orthogonal blocks, and drawn by the hash alone."""

import math

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_bits, assert_unbiased
from hyperattention.features import PositiveRandom

HEAD_DIM, SCALE = 8, 0.4
# seeds times heads of each test of an expectation, fixed beforehand
SEEDS, HEADS = 20, 200


def pairs(size: float = 0.5) -> tuple[Tensor, Tensor]:
    """Six queries, and as many keys, from short to long."""
    q, k = torch.randn(2, 6, HEAD_DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (size * torch.linspace(0.3, 1.2, 6, dtype=torch.float64)[:, None] * x for x in (q, k))


def estimates(features: PositiveRandom, q: Tensor, k: Tensor, scale: float = SCALE) -> Tensor:
    """Estimates of exp(scale q_i . k_i), ``[draws, pairs]``: a draw for every seed and head."""
    found = []
    for seed in range(SEEDS):
        frequency = features.frequencies(q.shape[1], torch.arange(HEADS), seed=seed)
        (phi, a), (psi, b) = (features.map(x.expand(1, HEADS, -1, -1), frequency, scale) for x in (q, k))
        found.append((phi * psi).sum(-1)[0] * (a + b)[0].exp())
    return torch.cat(found)


@pytest.mark.parametrize("features", [PositiveRandom(8), PositiveRandom(24), PositiveRandom(8, orthogonal=False)], ids=repr)
@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_products_of_features_are_unbiased(features, spread):
    features = PositiveRandom(features.num, features.orthogonal, spread)
    q, k = pairs()
    truth = (SCALE * (q * k).sum(-1)).exp()
    assert_unbiased(estimates(features, q, k) / truth, 1.0, largest_error=0.02)


def test_another_spread_without_its_weights_would_be_biased():
    wide, q, k = PositiveRandom(8, spread=2.0), *pairs()
    frequency = wide.frequencies(HEAD_DIM, torch.arange(HEADS), seed=0)
    # features that do not know how wide their frequencies were drawn
    (phi, a), (psi, b) = (PositiveRandom(8).map(x.expand(1, HEADS, -1, -1), frequency, SCALE) for x in (q, k))
    found = (phi * psi).sum(-1)[0] * (a + b)[0].exp() / (SCALE * (q * k).sum(-1)).exp()
    with pytest.raises(AssertionError, match="standard errors from the truth"):
        assert_unbiased(found, 1.0, largest_error=2.0)


def test_the_variance_of_independent_frequencies_is_that_of_the_formula():
    spread, num = 1.5, 64
    q, k = pairs(0.4)
    z = SCALE * (q + k).square().sum(-1)
    one = spread**HEAD_DIM * (2 * spread - 1) ** (-HEAD_DIM / 2) * (z / (2 * spread - 1)).exp() - 1
    # a pair of +w and -w: the covariance of both is E[u^4] exp(-2 s q.k) over the square of the mean, less 1
    both = (spread**HEAD_DIM * (2 * spread - 1) ** (-HEAD_DIM / 2) * (-z).exp() - 1 + one) / 2
    found = estimates(PositiveRandom(num, orthogonal=False, spread=spread), q, k) / (SCALE * (q * k).sum(-1)).exp()
    # the variance of a variance of four thousand draws with a tail: 20 %
    assert (found.var(0) / (2 * both / num)).tolist() == pytest.approx([1.0] * 6, rel=0.2)


def test_orthogonal_blocks_have_a_smaller_variance_than_independent_frequencies():
    q, k = pairs()
    truth = (SCALE * (q * k).sum(-1)).exp()
    blocks, independent = ((estimates(PositiveRandom(16, each), q, k) / truth).var(0) for each in (True, False))
    assert (blocks < 0.9 * independent).all()


def test_directions_are_orthogonal_and_lengths_are_those_of_gaussian_vectors():
    frequency = PositiveRandom(4 * HEAD_DIM).frequencies(HEAD_DIM, torch.arange(500), seed=1)
    length = torch.linalg.vector_norm(frequency, dim=-1, keepdim=True)
    gram = (frequency / length) @ (frequency / length).transpose(1, 2)
    eye = torch.eye(HEAD_DIM, dtype=torch.float64).expand(500, -1, -1)
    for block in (slice(0, HEAD_DIM), slice(HEAD_DIM, None)):
        assert_exact(gram[:, block, block], eye)
    assert gram[:, :HEAD_DIM, HEAD_DIM:].abs().max() > 0.5
    # a norm of d coordinates squared has mean d, and coordinates have mean 0: signs are not fixed by the factorisation
    assert_unbiased(length.square().flatten(1).mean(1), float(HEAD_DIM), largest_error=0.1)
    assert_unbiased(frequency[:, 0], 0.0, largest_error=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_feature_overflows_however_long_the_rows(dtype):
    features = PositiveRandom(16)
    x = torch.linspace(0, 300, 12)[:, None] * torch.randn(12, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    frequency = features.frequencies(HEAD_DIM, torch.arange(2), seed=0)
    phi, log_scale = features.map(x.to(dtype).expand(1, 4, -1, -1), frequency, 1.0)
    assert phi.dtype == log_scale.dtype == torch.float32
    assert torch.isfinite(log_scale).all()
    assert phi.min() >= 0
    assert_same_bits(phi.amax(-1), torch.ones_like(log_scale))


def test_draws_depend_on_seed_layer_and_head_alone():
    features, state = PositiveRandom(20), torch.get_rng_state()
    head = torch.tensor([3, 5])
    first = features.frequencies(HEAD_DIM, head, seed=1, layer=2)
    assert first.shape == (2, 10, HEAD_DIM)
    assert torch.equal(state, torch.get_rng_state())
    assert_same_bits(features.frequencies(HEAD_DIM, head.flip(0), seed=1, layer=2).flip(0), first)
    # fewer features are the first of more
    assert_same_bits(PositiveRandom(14).frequencies(HEAD_DIM, head, seed=1, layer=2), first[:, :7])
    for other in ({"seed": 2, "layer": 2}, {"seed": 1, "layer": 3}):
        assert not torch.equal(features.frequencies(HEAD_DIM, head, **other), first)
    assert not torch.equal(first[0], first[1])


def test_no_tokens_have_no_features():
    features = PositiveRandom(6)
    frequency = features.frequencies(HEAD_DIM, torch.arange(2), seed=0)
    phi, log_scale = features.map(torch.zeros(1, 4, 0, HEAD_DIM), frequency, 1.0)
    assert (phi.shape, log_scale.shape) == ((1, 4, 0, 6), (1, 4, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 7}, r"num=7\): features come in pairs of \+w and -w; use an even number"),
        ({"num": 0}, "num=0.*must be a positive integer"),
        ({"num": 4, "spread": 0.5}, "spread=0.5.*at least 1"),
        ({"num": 4, "spread": math.inf}, "spread=inf.*finite"),
        ({"num": 4, "spread": math.nan}, "spread=nan.*finite"),
    ],
)
def test_wrong_constants_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PositiveRandom(**options)
