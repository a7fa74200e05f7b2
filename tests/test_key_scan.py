"""Every key scored: what is rounded, what is found, and where another density takes over."""

import math

import pytest
import torch

import hyperattention as ha
from assertions import assert_same_bits
from cases import DESCENT
from hyperattention.select.score import scan
from hyperattention.select.stage import CoveredKeys
from hyperattention.tiling import cut
from problems import problem

TILE = 16


def expected_listings(density: ha.KeyScan, given, num: int = 24) -> torch.Tensor:
    tiles = cut(given, TILE)
    law = density.prepare(tiles, CoveredKeys(), num)(slice(0, len(tiles.index)))
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


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("fast", [True, False], ids=["integers", "floats"])
def test_listings_are_those_of_the_formula(monkeypatch, fast, causal):
    monkeypatch.setattr(scan, "integers_are_fast", lambda x: fast)
    monkeypatch.setattr(scan, "for_estimates", lambda x: x)
    given, num, share = problem(300, causal=causal, heads=4), 24, 0.2
    found = expected_listings(ha.KeyScan(TILE // 2, uniform_share=share), given, num)
    for one, tile in ((0, 18), (1, 9), (0, 12)):
        rows = slice(tile * TILE, (tile + 1) * TILE)
        k = given.k[0, one].double()
        q = given.q[0, 2 * one : 2 * one + 2, rows].double().unflatten(1, (-1, 2)).mean(2).flatten(0, 1) * given.scale
        before = tile * TILE if causal else given.num_keys
        seen = (tile + 1) * TILE if causal else given.num_keys
        seen = min(seen, given.num_keys)
        weight = []
        for query in q:
            scores, logs = k[:before] @ query, []
            for block in scores[: before // 64 * 64].view(-1, 64):
                # the biased variance of scores is the squares of the query with the variances of channels, uncorrelated
                first = k[: before // 64 * 64].view(-1, 64, k.shape[1])[len(logs)]
                logs.append(block.mean() + 0.5 * query.square() @ first.var(0, correction=0) + math.log(64))
            z = torch.stack(logs).logsumexp(0) if logs else scores.max()
            z = z.clamp(min=scores.max(), max=scores.max() + math.log(seen))
            weight.append((scores - z).exp())
        mass = torch.zeros(seen, dtype=torch.float64)
        mass[:before] = torch.stack(weight).amax(0)
        for _ in range(4):
            mass = mass.clamp(max=mass.sum().item() / ((1 - share) * num))
        mass = (mass / mass.sum() * (1 - share) * num + share * num / seen).clamp(max=1)
        truth = mass / mass.sum() * num
        off = (found[one, tile, :seen].double() - truth).abs().max()
        assert off < (0.15 if fast else 0.01) * truth.max(), f"tile {tile}: {off:.3g} of {truth.max():.3g}"


def test_heads_of_a_group_are_rounded_apart(monkeypatch):
    monkeypatch.setattr(scan, "integers_are_fast", lambda x: True)
    given = problem(144, causal=True, heads=2, kv_heads=1)
    small = given.q.clone()
    small[:, 1] *= 100  # one head's queries are large: the other's must not be rounded to nothing
    tiles = cut(given, TILE)
    pooled = scan.Scan.of(tiles, given.k.flatten(0, 1), tiles.arrange(small), 24)
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
    # the first 8,192 of a million keys are scanned all the same
    assert density.selection_pairs(2**20, 64, 64, True, 688) == pytest.approx(far, rel=0.02)
    assert density.selection_pairs(2**20, 64, 64, False, 688) == density.beyond.selection_pairs(2**20, 64, 64, False, 688)


def test_only_tiles_that_are_scanned_are_prepared(monkeypatch):
    made = []

    def watched(tiles, keys, query, num):
        made.append((len(tiles.index), keys.shape[1], query.shape[1]))
        return real(tiles, keys, query, num)

    real = scan.Scan.of
    monkeypatch.setattr(scan.Scan, "of", watched)
    method = ha.Method(ha.Window(16), ha.Draw(24, by=ha.KeyScan(8, most=80, beyond=DESCENT)), tile=TILE)
    method.attend(problem(400, causal=True))
    assert made == [(5, 80, 5)]
    # a later chunk of a prompt, all of whose tiles see too much
    later = problem(400, causal=True)
    method.attend(later.of_spans(96, 16, 32))
    assert len(made) == 1


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="pooled=0"):
        ha.KeyScan(0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        ha.KeyScan(uniform_share=1.0)
