"""The hash behind every draw: uniform, independent from counter to counter, and the same for ever."""

import math

import pytest
import torch

from assertions import assert_same_bits, assert_unbiased
from hyperattention.random import SEED_LIMIT, hash_bits, normal, uniform

CPU = torch.device("cpu")
COUNT = 20_000
# a chi-square statistic this many standard deviations above its mean happens once in 10,000 tests
DEVIATIONS = 4.0
# computed from the hash's definition with Python's integers
GOLDEN_ZERO = [1835255256, 844511302, 3165772840, 2296772723]
GOLDEN_LARGE = [1323358406, 3587625972, 1687329951, 2961917509]


def counters(axis: int) -> list[int | torch.Tensor]:
    """Five counters of which one runs: (seed, layer, head, tile, slot)."""
    return [torch.arange(COUNT) if i == axis else i for i in range(5)]


def assert_chi_square(counts: torch.Tensor) -> None:
    expected, freedom = counts.sum().item() / counts.numel(), counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(statistic - freedom) <= DEVIATIONS * math.sqrt(2 * freedom), (
        f"chi-square {statistic:.4g} with {freedom} degrees"
    )


@pytest.mark.parametrize("axis", range(5), ids=["seed", "layer", "head", "tile", "slot"])
def test_each_counter_alone_gives_uniform_numbers(axis):
    x = uniform(counters(axis), CPU)
    assert x.dtype == torch.float64
    assert x.min() >= 0
    assert x.max() < 1
    assert_chi_square((x * 64).long().bincount(minlength=64).double())
    # neighbours are independent: pairs fill the square evenly
    assert_chi_square(((x[:-1] * 16).long() * 16 + (x[1:] * 16).long()).bincount(minlength=256).double())


def test_every_bit_is_fair():
    bits = hash_bits(counters(4), CPU)
    assert bits.dtype == torch.int64
    assert bits.min() >= 0
    assert bits.max() < 2**32
    ones = (bits[:, None] >> torch.arange(32)) & 1
    assert_unbiased(ones, 0.5, largest_error=0.01)


@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("second", range(5))
def test_counters_do_not_interfere(first, second):
    if first >= second:
        pytest.skip("each pair of counters once")
    side = torch.arange(100)
    grid = [torch.zeros(1, dtype=torch.int64)] * 5
    grid[first], grid[second] = side[:, None], side
    bits = hash_bits(grid, CPU)
    # swapping or trading one counter for another is another draw: 10,000 values of 32 bits hardly ever meet
    assert bits.unique().numel() >= bits.numel() - 1
    assert_chi_square((bits >> 26).flatten().bincount(minlength=64).double())
    both = (bits >> 28)[:, :-1] * 16 + (bits >> 28)[:, 1:]
    assert_chi_square(both.flatten().bincount(minlength=256).double())


def test_both_halves_of_a_counter_count():
    small = hash_bits([torch.arange(100), 0], CPU)
    assert not torch.equal(hash_bits([torch.arange(100) + 2**32, 0], CPU), small)
    assert not torch.equal(hash_bits([torch.arange(100) + 2**62, 0], CPU), small)
    assert hash_bits([SEED_LIMIT - 1], CPU).shape == ()


def test_integers_and_tensors_are_the_same_counters():
    assert_same_bits(hash_bits([7, torch.tensor(3)], CPU), hash_bits([torch.tensor(7), 3], CPU))
    grid = hash_bits([5, torch.arange(4)[:, None], torch.arange(3)], CPU)
    assert grid.shape == (4, 3)
    assert_same_bits(grid[2, 1], hash_bits([5, 2, 1], CPU))


def test_normal_numbers_have_the_moments_of_the_normal_distribution():
    x = normal(counters(4), CPU)
    assert torch.isfinite(x).all()
    moments = torch.stack([x, x**2, x**3, x**4], 1)
    assert_unbiased(moments, torch.tensor([0.0, 1.0, 0.0, 3.0]), largest_error=0.1)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    first = hash_bits(counters(4), CPU)
    torch.manual_seed(99)
    assert_same_bits(hash_bits(counters(4), CPU), first)
    torch.set_rng_state(state)
    normal(counters(4), CPU)
    assert torch.equal(state, torch.get_rng_state())


def test_golden_values():
    """A change of the hash changes every result that anyone has stored: it must never happen unnoticed."""
    assert hash_bits([0, 0, 0, 0, torch.arange(4)], CPU).tolist() == GOLDEN_ZERO
    assert hash_bits([SEED_LIMIT - 1, 1, 2, 3, torch.arange(4)], CPU).tolist() == GOLDEN_LARGE
