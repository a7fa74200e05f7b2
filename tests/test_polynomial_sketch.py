"""Sketches of powers: unbiased at half the degree, never negative, and within the error that their size promises."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from assertions import assert_exact, assert_same_bits, assert_unbiased
from hyperattention.features import LearnedSketch, PolynomialSketch
from hyperattention.features.polynomial_sketch import RandomSketch, apply_sketch, self_tensor

# r = CONSTANT * p * eps^-2 * log(1 / delta): what the largest error of the inputs below, one direction, needs; for it
# eps^2 = 16 (p - 2) / r is expected, and a tenth of all draws may have 1.64 times that
CONSTANT, DELTA = 16, 0.1


def vectors(kind: str, num: int = 20, dim: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if kind == "one direction":
        direction = randn(1, dim)
        return randn(num, 1) * direction, randn(num, 1) * direction
    if kind == "few directions":
        directions = randn(2, dim)
        return randn(num, 2) @ directions, randn(num, 2) @ directions
    if kind == "one hot":
        one_hot = torch.eye(dim, dtype=torch.float64)
        return one_hot[torch.arange(num) % dim], one_hot[torch.arange(num) * 5 % dim]
    if kind == "layer norm":
        return layer_norm(randn(num, dim) + randn(1, dim), (dim,)), layer_norm(randn(num, dim) + randn(1, dim), (dim,))
    if kind == "heavy norms":
        return randn(num, dim) * (2 * randn(num, 1)).exp(), randn(num, dim) * (2 * randn(num, 1)).exp()
    return randn(num, dim), randn(num, dim)


KINDS = ["gaussian", "one direction", "few directions", "one hot", "layer norm", "heavy norms"]


def products(sketch: PolynomialSketch, q: Tensor, k: Tensor) -> Tensor:
    """M(q) . M(k), estimates of half the degree."""
    matrices = sketch.draw(q.shape[-1])
    return apply_sketch(q, matrices) @ apply_sketch(k, matrices).T


def error(weights: Tensor, q: Tensor, k: Tensor, degree: int) -> float:
    """The eps of the theorem: the error of all weights, in units of the norms to the power of the degree."""
    size = (q.norm(dim=-1) ** (2 * degree)).sum() * (k.norm(dim=-1) ** (2 * degree)).sum()
    return ((weights - (q @ k.T) ** degree).square().sum() / size).sqrt().item()


@pytest.mark.parametrize("degree", [4, 8])
def test_the_sketch_of_half_the_degree_is_unbiased(degree):
    q, k = (x[:3] / x[:3].norm(dim=-1, keepdim=True) for x in vectors("few directions"))
    estimates = torch.stack([products(PolynomialSketch(degree, 64, seed), q, k) for seed in range(400)])
    # the published code divides both matrices by sqrt(size): its products are 64 times too small, far outside this
    assert_unbiased(estimates, (q @ k.T) ** (degree // 2), largest_error=0.05)


def test_degree_two_is_not_sketched():
    q, k = vectors("gaussian")
    assert_same_bits(products(PolynomialSketch(2, 5), q, k), q @ k.T)
    assert PolynomialSketch(2, 5).features(12) == 12
    assert PolynomialSketch(4, 5).features(12) == 5


@pytest.mark.parametrize("degree", [4, 8])
def test_weights_are_never_negative_and_are_products_of_expanded_features(degree):
    q, k = vectors("gaussian")
    matrices = PolynomialSketch(degree, 7).draw(12)
    sketches = [apply_sketch(x, matrices) for x in (q, k)]
    weights = self_tensor(sketches[0]) @ self_tensor(sketches[1]).T
    half = sketches[0] @ sketches[1].T
    assert (half < 0).any()
    assert (weights >= 0).all()
    assert_exact(weights, half.square())


@pytest.mark.parametrize(("degree", "seeds", "eps"), [(4, 20, 0.5), (8, 10, 0.7)])
def test_the_error_is_within_what_the_size_promises(degree, seeds, eps):
    size = math.ceil(CONSTANT * degree * eps**-2 * math.log(1 / DELTA))
    failures = dict.fromkeys(KINDS, 0)
    for seed in range(seeds):
        matrices = PolynomialSketch(degree, size, seed).draw(12)
        for kind in KINDS:
            q, k = vectors(kind)
            weights = (apply_sketch(q, matrices) @ apply_sketch(k, matrices).T).square()
            failures[kind] += error(weights, q, k, degree) > eps
            # the scale of the published code, at which every weight is almost 0
            assert kind != "one direction" or error(weights / size**2, q, k, degree) > eps
    assert max(failures.values()) <= DELTA * seeds, failures


def test_the_error_falls_with_the_root_of_the_size():
    q, k = vectors("one direction")
    errors = [
        torch.tensor([error(products(PolynomialSketch(4, size, seed), q, k).square(), q, k, 4) for seed in range(60)])
        for size in (256, 1024)
    ]
    rms = [e.square().mean().sqrt().item() for e in errors]
    # as expected to first order, within the error of 60 draws; and half at four times the size
    for found, size in zip(rms, (256, 1024), strict=True):
        assert found == pytest.approx((16 * 2 / size) ** 0.5, rel=0.3)
    assert rms[0] / rms[1] == pytest.approx(2, rel=0.3)


def test_few_features_serve_many_directions_and_not_one():
    def middle(kind: str) -> float:
        q, k = vectors(kind)
        return torch.tensor(
            [error(products(PolynomialSketch(4, 32, s), q, k).square(), q, k, 4) for s in range(40)]
        ).median()

    # 16 (p - 2) / r = 1, at the published r of 32
    assert middle("one direction") > 0.4
    assert middle("layer norm") < 0.15
    assert middle("gaussian") < 0.15


def test_one_seed_gives_one_sketch_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    same, again, other = (PolynomialSketch(8, 6, seed).draw(5) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert [x.shape for x in same] == [(2, 2, 5, 6), (1, 2, 6, 6)]
    for x, y, z in zip(same, again, other, strict=True):
        assert_same_bits(x, y)
        assert not (x == z).any()
    numbers = torch.cat([x.flatten() for x in same])
    assert len(numbers.unique()) == len(numbers), "matrices of one sketch are independent"


@pytest.mark.parametrize("size", [1, 3, 6, 100])
def test_sizes_need_not_be_powers_of_two(size):
    q, k = vectors("gaussian")
    assert products(PolynomialSketch(8, size), q, k).isfinite().all()


@pytest.mark.parametrize(("degree", "size", "message"), [
    (3, 8, "degree=3.*must be even"), (0, 8, "degree=0"), (-2, 8, "degree=-2"), (True, 8, "degree=True"),
    (6, 8, "half of it, 3, must be a power of two.*use 2, 4, 8 or 16"), (12, 8, "half of it, 6"),
    (4, 0, "size=0.*positive"), (4, -1, "size=-1"),
])  # fmt: skip
def test_what_cannot_be_sketched_is_refused(degree, size, message):
    with pytest.raises(ValueError, match=message):
        PolynomialSketch(degree, size)


def test_a_random_sketch_is_saved_with_a_model_and_not_trained():
    sketch, other = (RandomSketch(PolynomialSketch(8, 6, seed), 5, dtype=torch.float64) for seed in (1, 2))
    assert not list(sketch.parameters())
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert_same_bits(sketch(x), apply_sketch(x, sketch.settings.draw(5)))
    other.load_state_dict(sketch.state_dict())
    assert_same_bits(other(x), sketch(x))


def test_the_learned_sketch_is_that_of_the_published_code():
    torch.manual_seed(0)
    sketch = LearnedSketch(12, 5, dtype=torch.float64)
    x = torch.randn(7, 12, dtype=torch.float64)
    assert [tuple(p.shape) for p in sketch.left.parameters() if p.ndim == 2] == [(40, 12), (5, 40), (40, 5), (5, 40)]
    inputs = []
    for branch in (sketch.left, sketch.right):
        y = x
        for up, down in ((branch[1], branch[3]), (branch[5], branch[7])):
            y = layer_norm(y, y.shape[-1:]) @ up.weight.T
            y = y * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3))) @ down.weight.T
        inputs.append(y)
    assert_exact(sketch(x), 5**0.5 * torch.tanh(inputs[0] * inputs[1] / 5**0.5))
    assert (sketch(100 * x).abs() <= 5**0.5).all()


@pytest.mark.parametrize("options", [{"head_dim": 0}, {"size": 0}, {"expansion": -1}, {"levels": 0}], ids=str)
def test_a_learned_sketch_names_a_bad_size(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"LearnedSketch\\({name}="):
        LearnedSketch(**{"head_dim": 8, **options})


def test_a_learned_sketch_of_many_vectors_is_that_of_each():
    torch.manual_seed(0)
    sketch, x = LearnedSketch(5, 4, dtype=torch.float64), torch.randn(3, 701, 5, dtype=torch.float64)
    whole = sketch(x)
    assert whole.shape == (3, 701, 4)
    for rows in (slice(0, 1), slice(250, 530), slice(700, 701)):
        torch.testing.assert_close(whole[:, rows], sketch(x[:, rows]))
    assert sketch(x[:, :0]).shape == (3, 0, 4)
