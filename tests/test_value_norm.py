"""Draws by the norm of the values: unbiased whatever the values, and better where they differ in size."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_unbiased
from front_door import with_lse
from hyperattention.select.density import Density, Distribution, Uniform
from hyperattention.select.score.value_norm import ValueNorm
from hyperattention.select.stage import CoveredKeys, LookAhead
from hyperattention.tiling import Tiles
from pair_weights import pair_weights, replicas

KEYS = 31
SIZES = torch.linspace(-1.5, 1.5, KEYS, dtype=torch.float64).exp()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class WrongShare(Distribution):
    """Keys drawn as `drawn` says, weighted as if `weighted` had."""

    drawn: Distribution
    weighted: Distribution

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        index, _ = self.drawn.draw(point)
        return index, self.share(index)

    def share(self, index: Tensor) -> Tensor:
        return self.weighted.share(index)


class WrongWeight(Density):
    """A planted violation: keys drawn by norm, weighted as if drawn uniformly."""

    def prepare(self, tiles: Tiles, taken: CoveredKeys, num: int) -> Callable[[slice], Distribution]:
        drawn, weighted = (by.prepare(tiles, taken, num) for by in (ValueNorm(), Uniform()))
        return lambda part: WrongShare(drawn(part), weighted(part))


def weights(method: ha.Method, causal: bool = False, sizes: Tensor = SIZES) -> Tensor:
    q, k = replicas(tokens(1, 1, KEYS, 4), tokens(1, 1, KEYS, 4, seed=1), 600)
    return pair_weights(method, q, k, sizes, is_causal=causal)[0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("by", [ValueNorm(), ValueNorm(power=2), ValueNorm(power=2, mix=1.0), ValueNorm(mix=0.1)])
def test_partition_of_unity(by: ValueNorm, causal: bool) -> None:
    seen = dense.visible(KEYS, KEYS, causal=causal).double()
    for stages in ((ha.Draw(6, by=by),), (ha.Sinks(2), ha.Window(6), ha.Draw(6, by=by))):
        weight = weights(ha.Method(*stages, tile=5), causal)
        assert_unbiased(weight, seen, largest_error=0.35, rounding=1e-6)


def test_the_partition_test_catches_a_wrong_weight() -> None:
    weight = weights(ha.Method(ha.Draw(6, by=WrongWeight()), tile=5))
    with pytest.raises(AssertionError, match="standard errors from the truth"):
        assert_unbiased(weight, torch.ones(KEYS, KEYS, dtype=torch.float64), largest_error=0.35)


@pytest.mark.parametrize("power", [1, 2])
def test_keys_are_drawn_as_often_as_the_formula_says(power: int) -> None:
    weight = weights(ha.Method(ha.Draw(4, by=ValueNorm(power=power, mix=0.25)), tile=KEYS))[:, 0]
    share = 0.25 / KEYS + 0.75 * SIZES**power / (SIZES**power).sum()
    # a key listed c times carries c / (num * share)
    listed = weight * 4 * share
    assert_exact(listed.float(), listed.round().float())
    assert_unbiased(listed, 4 * share, largest_error=0.05, rounding=1e-6)


def test_larger_values_first_means_less_variance() -> None:
    sizes = torch.where(torch.arange(KEYS) % 10 == 0, 20.0, 0.1).double()
    spread = {
        by: (weights(ha.Method(ha.Draw(6, by=by), tile=KEYS), sizes=sizes)[:, 0] * sizes).var(0).sum().item()
        for by in (Uniform(), ValueNorm())
    }
    assert spread[ValueNorm()] < spread[Uniform()] / 2


@pytest.mark.parametrize("causal", [False, True])
def test_where_every_value_is_0_all_keys_are_alike(causal: bool) -> None:
    q, k = replicas(tokens(1, 1, KEYS, 4), torch.zeros(1, 1, KEYS, 4, dtype=torch.float64), 200)
    for stages in ((), (ha.Sinks(2), ha.Window(6))):
        method = ha.Method(*stages, ha.Draw(6, by=ValueNorm()), tile=5)
        lse = with_lse(q, k, k, method=method, is_causal=causal)[1]
        # every score is 0, so that a denominator is a sum of weights: the number of keys in view
        seen = dense.visible(KEYS, KEYS, causal=causal).sum(1)
        assert_unbiased(lse[0].exp(), seen.double(), largest_error=0.5, rounding=1e-4)


def test_values_that_are_not_finite_never_break_the_draws() -> None:
    q, k = tokens(1, 1, 20, 4), tokens(1, 1, 20, 4, seed=1)
    v = k.clone()
    v[0, 0, 3], v[0, 0, 7], v[0, 0, 9] = torch.nan, torch.inf, 1e300
    for power in (1, 2):
        method = ha.Method(ha.Window(2), ha.Draw(4, by=ValueNorm(power=power)), tile=4)
        assert ha.attention(q, k, v, method=method, is_causal=True).shape == q.shape


def test_behind_a_window_no_later_value_is_looked_at() -> None:
    q, k, v = (tokens(1, 1, 60, 4, seed=i) for i in range(3))
    method = ha.Method(ha.Sinks(1), ha.Window(4), ha.Draw(4, by=ValueNorm()), tile=5)
    later = v.clone()
    later[:, :, 42:] *= 50
    first, second = (ha.attention(q, k, x, method=method, is_causal=True) for x in (v, later))
    assert_same_bits(first[:, :, :42], second[:, :, :42])
    assert not torch.equal(first[:, :, 42:], second[:, :, 42:])


def test_declarations_and_bad_arguments() -> None:
    assert ValueNorm().looks_ahead is LookAhead.TILE
    assert ha.Method(ha.Draw(4, by=ValueNorm())).cost(100).selection_pairs == 1
    assert repr(ValueNorm(power=2)) == "ValueNorm(power=2, mix=0.3)"
    for bad in ({"power": 0}, {"mix": 0.0}, {"mix": 1.5}, {"mix": float("nan")}):
        with pytest.raises(ValueError, match="ValueNorm"):
            ValueNorm(**bad)
