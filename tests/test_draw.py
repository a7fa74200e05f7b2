"""Draws: a key weighs one over its expected listings by all laws together, and an empty law lists nothing."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from assertions import assert_exact, assert_unbiased
from hyperattention import select
from hyperattention.select.density import Density, Distribution
from hyperattention.select.stage import CoveredKeys
from hyperattention.tiling import Tiles
from problems import problem

NUM = 40


@dataclass(frozen=True)
class Written(Distribution):
    """Probabilities as they are given, one a key."""

    share_of: Tensor

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.searchsorted(self.share_of.cumsum(0), point.float().contiguous(), right=True)
        return index, self.share_of[index]

    def share(self, index: Tensor) -> Tensor:
        return self.share_of[index]


@dataclass(frozen=True)
class Given(Density):
    """The same probabilities for every tile."""

    shares: tuple[float, ...]

    def prepare(self, tiles: Tiles, taken: CoveredKeys, num: int) -> Callable[[slice], Distribution]:
        return lambda part: Written(torch.tensor(self.shares))


# over 64 keys: the first 48 evenly, and the last 32 by halves of two sizes
LEFT = Given((1 / 48,) * 48 + (0.0,) * 16)
RIGHT = Given((0.0,) * 32 + (1 / 128,) * 16 + (7 / 128,) * 16)


@pytest.mark.parametrize(
    ("parts", "numbers"), [(((LEFT, 3.0), (RIGHT, 1.0)), (30, 10)), (((RIGHT, 0.2), (LEFT, 0.8)), (8, 32))]
)
def test_a_key_weighs_one_over_its_expected_listings_by_all_laws(parts, numbers):
    tokens = problem(64, causal=False)
    ((_, selection),) = ha.Method(ha.Draw(NUM, by=select.Mix(*parts)), tile=16).selections(tokens)
    (run,) = selection.runs
    # each law has its share of the slots, in order: its keys stand there, and no other's
    assert run.sample is not None
    assert run.sample.sizes == numbers
    laws = [torch.tensor(law.shares) for law, _ in parts]
    for law, slots in zip(laws, run.first.split(numbers, 2), strict=True):
        assert (law[slots] > 0).all()
    expected = sum(num * law for num, law in zip(numbers, laws, strict=True))
    assert_exact(run.log_weight, -expected[run.first].log(), size=1.0)
    # beside it stands how often its own law lists it, which standard errors need
    own = torch.cat(
        [num * law[slots] for num, law, slots in zip(numbers, laws, run.first.split(numbers, 2), strict=True)], 2
    )
    assert run.sample.listings is not None
    assert_exact(run.sample.listings, own, size=1.0)


def test_a_law_with_nothing_to_draw_from_leaves_its_slots_empty():
    # no block of 64 keys is left whole before the window of the last tile but one: seven of ten draws have no law
    method = ha.Method(ha.Window(16), ha.Draw(20, by=select.BlockScore(64)), tile=16)
    weights = []
    for seed in range(40):
        tokens = problem(80, seed=seed)
        weights.append(dense.weights(method, tokens)[0, :, 64:].mean(1))
    ((_, selection),) = method.selections(problem(80))
    assert (selection.runs[-1].log_weight[:, 4] > -torch.inf).sum(-1).tolist() == [6, 6]
    seen = dense.visible(80, 80, causal=True)[64:].double().mean(0)
    assert_unbiased(torch.cat(weights), seen, largest_error=0.5, rounding=1e-5)
