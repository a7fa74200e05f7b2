"""Every key scored: what is rounded, what is found, and where another density takes over."""

import pytest
import torch

import hyperattention as ha
from assertions import assert_same_bits
from cases import DESCENT
from hyperattention.select.score import scan
from hyperattention.select.stage import Taken
from hyperattention.tiling import cut
from problems import problem

TILE = 16


def expected_listings(density: ha.KeyScan, given, num: int = 24) -> torch.Tensor:
    tiles = cut(given, TILE)
    law = density.prepare(tiles, Taken(), num)(slice(0, len(tiles.index)))
    key = torch.arange(given.num_keys).expand(
        *law.share(torch.zeros(2, len(tiles.index), 1, dtype=torch.long)).shape[:2], -1
    )
    return num * law.share(key)


def needle(place: int = 40, query: int = 133):
    """One query of the last tile looks for one key, far stronger than anything else that anybody sees."""
    given = problem(144, causal=True, heads=2, kv_heads=2)
    given.q.mul_(0.1)
    given.k.sub_(1.0).mul_(0.3)
    given.k[:, :, place] = torch.nn.functional.normalize(torch.ones(8), dim=0) * 6
    given.q[:, :, query] = torch.nn.functional.normalize(torch.ones(8), dim=0) * 6
    return given


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_rounding_hardly_moves_the_listings(monkeypatch, causal):
    given = problem(200, causal=causal, heads=4)
    found = {}
    for fast in (True, False):
        monkeypatch.setattr(scan, "integers_are_fast", lambda x, fast=fast: fast)
        monkeypatch.setattr(scan, "for_estimates", lambda x: x)
        found[fast] = expected_listings(ha.KeyScan(TILE), given)
    # keys are rounded to a sixteenth of the largest number of their channel: a weight moves by some hundredths of itself
    assert (found[True] - found[False]).abs().mean() < 0.05 * found[False].std()


def test_a_key_that_one_query_looks_for_is_found_if_that_query_is_not_averaged():
    given = needle()
    alone, averaged = (expected_listings(ha.KeyScan(pooled), given)[:, -1, 40] for pooled in (TILE, 1))
    assert alone.min() > 0.9
    assert averaged.max() < 0.5


def test_heads_of_a_group_are_rounded_apart():
    given = problem(144, causal=True, heads=2, kv_heads=1)
    small = given.q.clone()
    small[:, 1] *= 100  # one head's queries are large: the other's must not be rounded to nothing
    tiles = cut(given, TILE)
    pooled = scan.Scan.of(tiles, given.k.flatten(0, 1), tiles.arrange(small), 24)
    if pooled.query.dtype != torch.int8:
        pytest.skip("this processor multiplies no 8-bit integers fast: nothing is rounded")
    assert (pooled.query.abs().amax((3, 4)) == 127).all()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_another_density_draws_for_tiles_that_see_too_much(causal):
    given = problem(150, causal=causal)
    both = ha.Method(ha.Window(16), ha.Draw(24, by=ha.KeyScan(8, most=80, beyond=DESCENT)), tile=TILE)
    alone = ha.Method(ha.Window(16), ha.Draw(24, by=DESCENT), tile=TILE)
    scanned = ha.Method(ha.Window(16), ha.Draw(24, by=ha.KeyScan(8)), tile=TILE)
    out, beyond, before = (method.attend(given).out for method in (both, alone, scanned))
    if not causal:
        assert_same_bits(out, beyond)
        return
    assert_same_bits(out[:, :, 80:], beyond[:, :, 80:])
    assert_same_bits(out[:, :, :80], before[:, :, :80])
    assert not torch.equal(beyond[:, :, :80], before[:, :, :80])


def test_products_are_counted_and_bounded():
    density = ha.KeyScan(32, most=8192)
    # 32 of 64 queries times half of the keys, and two vectors for each block of 64 of them
    assert density.selection_pairs(8192, 64, 64, True, 688) == pytest.approx(0.5 * 4096 * (1 + 2 / 64))
    far = density.beyond.selection_pairs(2**20, 64, 64, True, 688)
    assert density.selection_pairs(2**20, 64, 64, True, 688) == pytest.approx(far, rel=0.02)
    assert density.selection_pairs(2**20, 64, 64, False, 688) == density.beyond.selection_pairs(2**20, 64, 64, False, 688)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="pooled=0"):
        ha.KeyScan(0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        ha.KeyScan(uniform_share=1.0)
