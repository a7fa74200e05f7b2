"""Candidates: which keys every list of a tile scores, the law of draws from them and all others, and needles."""

from dataclasses import replace

import pytest
import torch

import dense
import hyperattention as ha
from assertions import assert_exact
from hyperattention.bench.rows import Row
from hyperattention.reference.model import load_reference
from hyperattention.reference.passes import run_pass
from hyperattention.reference.samples import samples_of_documents
from hyperattention.reference.text import held_out_documents
from hyperattention.select import DrawAlike
from hyperattention.select.alike import sort_alike
from hyperattention.select.score import pooling
from hyperattention.select.score.alike_scan import NORMAL, AlikeScan, blocks_of
from hyperattention.select.score.candidates import Candidates, candidates_of
from hyperattention.tiling import cut
from problems import problem

TILE = 32
# what two tiles were left of 30 keys: a hole inside, and all but the last keys
LEFT = tuple(torch.tensor(x)[None, :, None] for x in ([3, 0], [13, 24], [25, 24], [29, 24]))


def there(tile: int) -> torch.Tensor:
    begin, hole_begin, hole_end, end = (int(x[0, tile, 0]) for x in LEFT)
    key = torch.arange(30)
    return ((key >= begin) & (key < hole_begin)) | ((key >= hole_end) & (key < end))


def shares(many: int = 1) -> torch.Tensor:
    return torch.rand(1, 2, many, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(6)


def law(even: float = 0.25, num: int = 8) -> Candidates:
    found = candidates_of(shares()[:, :, 0].log(), LEFT, 7)
    among = shares(3).gather(3, found[:, :, None].expand(-1, -1, 3, -1))
    return Candidates.of(among, found, LEFT, num, even)


def test_candidates_are_the_keys_of_the_largest_shares_that_are_left():
    given = shares()[:, :, 0]
    found = candidates_of(given.log(), LEFT, 7)
    for tile in range(2):
        best = given[0, tile].masked_fill(~there(tile), -1).topk(7).indices.sort()[0]
        assert found[0, tile].tolist() == best.tolist()


def test_where_fewer_are_left_the_places_behind_them_hold_no_key():
    found = candidates_of(shares()[:, :, 0].log(), LEFT, 20)
    assert found[0, 0].tolist() == [*torch.arange(30)[there(0)].tolist(), *[30] * 6]
    every = Candidates.of(shares(3).gather(3, found[:, :, None].expand(-1, -1, 3, -1).clamp(max=29)), found, LEFT, 8, 0.25)
    index, chance = every.draw(((torch.arange(8) + 0.5) / 8).expand(1, 6, -1))
    assert (index[0, :3, :, None] == torch.arange(30)[there(0)]).any(-1).all()
    assert_exact(every.share(index), chance)


def test_listings_are_those_of_the_formula():
    found, chance = candidates_of(shares()[:, :, 0].log(), LEFT, 7), law().share(torch.arange(30).expand(1, 6, -1))
    for tile in range(2):
        key, left = torch.arange(30), there(tile)
        candidate = (key[:, None] == found[0, tile]).any(1)
        for one in range(3):
            mass = shares(3)[0, tile, one] * candidate
            for _ in range(4):
                mass = mass.clamp(max=mass.sum().item() / (0.75 * 8))
            mass = (mass / mass.sum() * 0.75 * 8 + left * 0.25 * 8 / left.sum()).clamp(max=1)
            assert_exact(chance[0, 3 * tile + one].float(), (mass / mass.sum()).float())


def test_every_key_that_is_left_has_a_weight_of_one_on_average():
    num, offsets = 8, 4000
    found = candidates_of(shares()[:, :, 0].log(), LEFT, 7)
    # lists that differ by where inside a slot their points lie
    same = shares().gather(3, found[:, :, None]).expand(-1, -1, offsets, -1).clone()
    noise = ((torch.arange(offsets, dtype=torch.float64) + 0.5) / offsets).repeat(2)[None, :, None]
    index, chance = Candidates.of(same, found, LEFT, num, 0.25).draw((torch.arange(num) + noise) / num)
    weight = torch.zeros(2 * offsets, 30, dtype=torch.float64).scatter_add(1, index[0], 1 / (chance[0] * num))
    for tile, mean in enumerate(weight.unflatten(0, (2, offsets)).mean(1)):
        assert (mean[there(tile)] - 1).abs().max() < 0.02
        assert (mean[~there(tile)] == 0).all()


def test_keys_that_no_query_knows_are_among_the_others():
    # fewer keys are known than may be candidates, and more are left than are known
    log = shares()[:, :, 0].log()
    log[..., 12:] = -torch.inf
    found = candidates_of(log, LEFT, 16)
    assert (found == 30).any()
    same = shares().gather(3, found[:, :, None].clamp(max=29)).expand(-1, -1, 500, -1).clone()
    same.masked_fill_((found == 30)[:, :, None], 0.0)
    noise = ((torch.arange(500, dtype=torch.float64) + 0.5) / 500).repeat(2)[None, :, None]
    index, chance = Candidates.of(same, found, LEFT, 8, 0.25).draw((torch.arange(8) + noise) / 8)
    weight = torch.zeros(1000, 30, dtype=torch.float64).scatter_add(1, index[0], 1 / (chance[0] * 8))
    for tile, mean in enumerate(weight.unflatten(0, (2, 500)).mean(1)):
        assert (mean[there(tile)] - 1).abs().max() < 0.05
        assert (mean[~there(tile)] == 0).all()


def test_each_of_a_million_other_keys_can_be_drawn():
    keys, num, offsets = 2**20, 640, 4096
    left = tuple(torch.tensor([[[x]]]) for x in (0, keys, keys, keys))
    found = torch.arange(0, keys, keys // 1024)[None, None]
    share = torch.full((1, 1, offsets, 1024), 1e-3)
    # a slot of the others has 16,384 keys: points lie a quarter of a key apart
    noise = ((torch.arange(offsets, dtype=torch.float64) + 0.5) / 2**16)[None, :, None]
    index, chance = Candidates.of(share, found, left, num, 0.1).draw((torch.arange(num) + noise) / num)
    others = index[chance < chance.max() / 2]
    count = others.bincount()
    # four of each, but for the ends; steps of float32 are larger than a key here
    assert count.max() <= 5
    assert len(others) > 60 * offsets
    assert (count > 0).sum() > 0.95 * len(others) / 4


def test_drawn_keys_have_the_chance_that_is_told():
    index, chance = law().draw(((torch.arange(16) + 0.5) / 16).expand(1, 6, -1))
    assert_exact(law().share(index), chance)
    assert (chance > 0).all()


def test_coarse_averages_are_those_of_groups_of_averages():
    given = problem(96, heads=4, kv_heads=2)
    tiles = cut(given, TILE)
    _, query, few = sort_alike(tiles, 4)
    fine = AlikeScan.of(tiles, query, few, 5)
    # as many groups as averages: nothing is averaged again
    same = fine.coarser(20)
    order = torch.cdist(same.query[:, :, 0], fine.query.flatten(2, 3)).argmin(-1)
    assert all(len(set(each.tolist())) == 20 for each in order.flatten(0, 1))
    one = fine.coarser(1)
    rows = (2 * fine.log_rows).exp().flatten(2)[..., None]
    # lists have equally many queries
    assert_exact(one.query[:, :, 0, 0], (fine.query.flatten(2, 3) * rows).sum(2) / rows.sum(2))
    width = query.shape[4]
    apart = (query.flatten(2, 3) - one.query[:, :, 0]).square().mean(2)
    assert_exact(one.spread[:, :, 0, :width], apart)


def test_shares_among_all_keys_are_those_of_all_keys():
    given = problem(200, heads=4, kv_heads=2)
    tiles = cut(given, TILE)
    _, query, few = sort_alike(tiles, 4)
    scan, part = AlikeScan.of(tiles, query, few, 4), slice(2, 6)
    keys = blocks_of(given.k.flatten(0, 1), given.v.flatten(0, 1), 1, 24)
    every = scan.shares(part, keys, 192)
    index = torch.arange(192).expand(2, 4, -1)
    assert_exact(scan.shares_among(part, keys, index), every)
    assert_exact(scan.shares_among(part, keys, index[..., 1::3]), every[..., 1::3])
    assert_exact(scan.of_tiles(part).shares(part, keys, 192), every)


def test_a_key_that_one_query_looks_for_is_listed_for_certain_among_many_keys():
    given = problem(512, causal=True, heads=2, kv_heads=2)
    given.q.mul_(0.1)
    given.k.sub_(1.0).mul_(0.3)
    given.k[:, :, 200] = given.q[:, :, 490] = torch.nn.functional.normalize(torch.ones(8), dim=0) * 6
    method = ha.Method(ha.Window(16), DrawAlike(24, rows=8, pooled=2, most=128, candidates=3), tile=TILE)
    for seed in range(8):
        weight = dense.weights(method, replace(given, seed=seed))[0, :, 490, 200]
        assert (weight > 0.8).all()
        assert (weight < 1.2).all()


@pytest.mark.slow
def test_a_model_retrieves_by_candidates_what_blocks_of_keys_lose():
    judged = load_reference()
    sample = samples_of_documents(held_out_documents(8192, 4))[3]
    right = {}
    for candidates in (None, 3):
        stage = DrawAlike(320, pooled=16, most=2048, candidates=candidates)
        done = run_pass(judged, sample, Row("", "", ha.Method(ha.Sinks(16), ha.Window(192), stage, tile=128)))
        assert done.approximated == done.calls > 0
        right[candidates] = done.right.float().mean().item()
    # exact attention answers all
    assert right[3] > 0.97
    assert right[None] < 0.9


def test_chunks_change_no_list(monkeypatch):
    given = problem(600, causal=True, heads=4, kv_heads=2)
    method = ha.Method(ha.Window(16), DrawAlike(24, rows=16, pooled=4, most=100, candidates=2), tile=TILE)
    whole = dense.weights(method, given)
    monkeypatch.setattr(pooling, "SCORE_BYTES", 2**17)
    assert_exact(dense.weights(method, given), whole)


def test_products_are_counted_and_bounded():
    stage = DrawAlike(640, rows=64, pooled=16, most=32_768, candidates=12, coarse=4)
    assert stage.selection_pairs(32_768, 256, 64, True) == replace(stage, candidates=None).selection_pairs(
        32_768, 256, 64, True
    )
    # the second half: sixteen averages a list for candidates with two for deviations, four for every key with their
    # stretches and a tile's deviations, and the stretches of the sixteen
    second = (7680 * (16 * (1 + 2 / NORMAL) + 2) * 4 + 49_152 * (16 * (1 + 2 / NORMAL) + 2 + 64 * 2 / NORMAL)) / 256
    half = stage.selection_pairs(32_768, 256, 64, True) / 2
    assert stage.selection_pairs(65_536, 256, 64, True) == pytest.approx(half + second / 2)
    # all averages of a tile take as many products for `most` keys; what is left grows by stretches and deviations alone
    million, more = (stage.selection_pairs(2**n, 256, 64, True) for n in (20, 21))
    assert million < 32_768 * 16 / 64 + 7680 * 19 / 64 + 2**19 * (2 + 64 * 2 / NORMAL) / 256
    assert more < 2 * million


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="candidates=0"):
        DrawAlike(16, candidates=0)
    with pytest.raises(ValueError, match="coarse=0"):
        DrawAlike(16, coarse=0)
