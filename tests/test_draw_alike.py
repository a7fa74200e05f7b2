"""Queries that look for similar keys share a list: how they are sorted, what is scored, and where blocks take over."""

from dataclasses import replace

import pytest
import torch

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_unbiased
from hyperattention.problem import Problem
from hyperattention.select import DrawAlike
from hyperattention.select.alike import sort_alike
from hyperattention.select.score import alike_scan
from hyperattention.select.score.alike_scan import NORMAL, AlikeScan, blocks_of
from hyperattention.select.score.groups import grouped
from hyperattention.select.score.stretches import stretches_of
from hyperattention.tiling import cut
from problems import problem

TILE = 32


@pytest.mark.parametrize(("count", "heads", "tile", "many"), [(64, 2, 32, 4), (75, 6, 32, 3), (20, 3, 32, 5)])
@pytest.mark.parametrize("offset", [0, 37])
def test_sorted_rows_go_back_to_where_they_stood(count, heads, tile, many, offset):
    given = problem(count + offset, heads=heads, kv_heads=heads // 3 or 1, batch=2)
    given = Problem(given.q[:, :, :count], given.k, given.v, given.scale, causal=True, offset=offset)
    tiles, query, _ = sort_alike(cut(given, tile), many)
    assert_same_bits(tiles.restore(tiles.arrange(given.q)), given.q)
    # what is averaged is what attends
    rows = tiles.arrange(given.q * given.scale)
    assert_exact(query.flatten(1, 2)[tiles.live], rows[tiles.live])
    assert_same_bits(tiles.join(tiles.split(given.q)), given.q)
    assert tiles.live.sum() == given.q[..., 0].numel()
    # live rows name every query of the group once
    each = heads * count // given.k.shape[1]
    for source, live in zip(tiles.source, tiles.live, strict=True):
        assert_same_bits(source[live].sort()[0], torch.arange(each))


def test_queries_that_look_the_same_way_share_a_list():
    given = problem(TILE, causal=True, heads=4, kv_heads=1)
    way = torch.randperm(4 * TILE, generator=torch.Generator().manual_seed(0)).view(4, TILE) // TILE
    # four directions of unlike length, so that no cut has a choice
    far = torch.tensor([[9.0, 0.0], [4.0, 1.0], [-4.0, 1.0], [-9.0, 0.0]])[way]
    given.q.mul_(0.01)[0, ..., :2].add_(far)
    tiles, _, _ = sort_alike(cut(given, TILE), 4)
    shared = tiles.arrange(way[None, ..., None].to(given.q.dtype))[0, ..., 0]
    assert (shared == shared[:, :1]).all()
    assert len(shared[:, 0].unique()) == 4


def test_listings_are_those_of_the_formula():
    share = torch.rand(1, 2, 3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(6)
    share[0, 0, 0] = 0.0
    left = tuple(torch.tensor(x)[None, :, None] for x in ([3, 3], [13, 17], [25, 30], [29, 30]))
    num, even = 12, 0.25
    law = stretches_of(share.clone(), 3, left, num, even, True)
    chance = law.share(torch.arange(30).expand(1, 6, -1))
    for tile in range(2):
        begin, hole_begin, hole_end, end = (int(x[0, tile, 0]) for x in left)
        key = torch.arange(30)
        there = ((key >= begin) & (key < hole_begin)) | ((key >= hole_end) & (key < end))
        for one in range(3):
            mass = share[0, tile, one].repeat_interleave(3) * there
            for _ in range(4):
                mass = mass.clamp(max=mass.sum().item() / ((1 - even) * num))
            weighted = mass / mass.sum().clamp(min=1e-30) * (1 - even) * num
            mass = (weighted + there * (even if mass.any() else 1) * num / there.sum()).clamp(max=1)
            assert_exact((chance[0, 3 * tile + one]).float(), (mass / mass.sum()).float())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_drawn_keys_have_the_chance_that_is_told(causal):
    given = problem(140, causal=causal)
    tiles = cut(given, 20)
    _, query, few = sort_alike(tiles, 2)
    part, keys, values = slice(0, len(tiles.index)), given.k.flatten(0, 1), given.v.flatten(0, 1)
    share = AlikeScan.of(tiles, query, few, 5).shares(part, blocks_of(keys, values, 4, 16), 35)
    end = tiles.by_list(tiles.visible_end)[..., None]
    law = stretches_of(share, 4, (end * 0, end, end, end), 16, 0.2, False)
    points = ((torch.arange(16) + 0.5) / 16).expand(2, 2 * len(tiles.index), -1)
    index, chance = law.draw(points)
    assert_exact(law.share(index), chance)
    assert (index < end.repeat_interleave(2, 1)).all()


@pytest.mark.parametrize("size", [1, 4])
def test_rounding_hardly_moves_the_shares(monkeypatch, size):
    given = problem(200, causal=True, heads=4)
    found = {}
    for fast in (True, False):
        monkeypatch.setattr(alike_scan, "integers_are_fast", lambda x, fast=fast: fast)
        monkeypatch.setattr(alike_scan, "for_estimates", lambda x: x)
        tiles = cut(given, TILE)
        _, query, few = sort_alike(tiles, 4)
        blocks = blocks_of(given.k.flatten(0, 1), given.v.flatten(0, 1), size, 24)
        found[fast] = AlikeScan.of(tiles, query, few, 4).shares(slice(0, len(tiles.index)), blocks, -(-200 // size))
    assert (found[True] - found[False]).abs().mean() < 0.05 * found[False].std()


def test_no_query_knows_of_keys_in_its_tile_or_after():
    given = problem(200, causal=True)
    tiles = cut(given, TILE)
    _, query, few = sort_alike(tiles, 4)
    for size in (1, 8):
        blocks = blocks_of(given.k.flatten(0, 1), given.v.flatten(0, 1), size, 24)
        share = AlikeScan.of(tiles, query, few, 4).shares(slice(0, 7), blocks, -(-200 // size))
        first = torch.arange(share.shape[3]) * size
        ahead = first + size > (torch.arange(7) * TILE)[:, None]
        assert (share.transpose(2, 3)[:, ahead] == 0).all()
        assert (share.transpose(2, 3)[:, ~ahead] > 0).all()


def test_sums_are_exact_where_runs_of_sixteen_keys_are_alike():
    given = problem(1024, causal=True, heads=2, kv_heads=2)
    # sharp: a sum is that of a few runs
    given.k.copy_(4 * given.k[:, :, ::16].repeat_interleave(16, 2))
    tiles = cut(given, TILE)
    _, query, few = sort_alike(tiles, 2)
    scan, part = AlikeScan.of(tiles, query, few, 4), slice(16, 32)
    keys = blocks_of(given.k.flatten(0, 1), given.v.flatten(0, 1), 1, 24)
    _, bar = scan.bars(part, keys)
    centred = given.k - given.k[:, :, :24].mean(2, keepdim=True)
    for tile in range(16):
        # whole runs before the tile: all keys
        before = centred.transpose(0, 1)[:, :, : (16 + tile) * TILE]
        exact = (scan.query[:, 16 + tile] @ before.transpose(2, 3)).logsumexp(-1)
        assert (bar[:, tile] + scan.log_rows[:, 16 + tile] - exact).abs().max() < 1e-3


def test_a_row_unlike_all_others_has_a_group_of_its_own():
    x = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0))
    x[:, 7] = 30.0
    one_of = grouped(x, 4)
    assert (one_of.sum(2) == 1).all()
    assert_same_bits(one_of.transpose(1, 2).flatten(0, 1)[one_of[:, 7].flatten() == 1].sum(1), torch.ones(3))
    # rows that are all alike need no more than one
    assert (grouped(torch.ones(2, 5, 8), 3).sum(1) > 0).sum() == 2


def test_a_key_that_one_query_looks_for_is_listed_for_certain():
    given = problem(128, causal=True, heads=2, kv_heads=2)
    given.q.mul_(0.1)
    given.k.sub_(1.0).mul_(0.3)
    given.k[:, :, 20] = torch.nn.functional.normalize(torch.ones(8), dim=0) * 6
    given.q[:, :, 117] = torch.nn.functional.normalize(torch.ones(8), dim=0) * 6
    method = ha.Method(ha.Window(16), DrawAlike(24, rows=8, pooled=2), tile=TILE)
    for seed in range(8):
        weight = dense.weights(method, replace(given, seed=seed))[0, :, 117, 20]
        assert (weight > 0.8).all()
        assert (weight < 1.2).all()


def test_parts_that_do_not_come_out_even_leave_the_weights_unbiased():
    given = problem(130, causal=True, heads=3, kv_heads=1)
    method = ha.Method(ha.Window(8), DrawAlike(40, rows=12, pooled=5, most=48, candidates=None), tile=15)
    seen = dense.visible(130, 130, causal=True).double()
    place = torch.arange(130)
    bins = (place * 8 // 130 == torch.arange(8)[:, None]).double()
    statistics = []
    for seed in range(40):
        weight = dense.weights(method, Problem(given.q, given.k, given.v, given.scale, causal=True, seed=seed))[0]
        assert ((weight > 0) <= (seen > 0)).all()
        statistics.append(((weight - seen).mean(0).sum(0) @ bins.T) / (seen.sum(0) @ bins.T))
    # all keys of some tiles are listed, in every draw
    assert_unbiased(torch.stack(statistics), 0.0, largest_error=0.05, rounding=1e-6)


def test_products_are_counted_and_bounded():
    stage = DrawAlike(688, rows=64, pooled=8, most=32_768, candidates=None)
    # for each list of 64 queries eight averages with every key seen and the moments of stretches, and two for deviations
    assert stage.selection_pairs(32_768, 256, 64, True) == pytest.approx(16_384 * (8 * (1 + 2 / NORMAL) + 2) / 64)
    million, more = (stage.selection_pairs(2**n, 256, 64, True) for n in (20, 23))
    assert more < 1.1 * million < 1.2 * 32_768 * 11 / 64


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="pooled=0"):
        DrawAlike(16, pooled=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        DrawAlike(16, uniform_share=1.0)
    with pytest.raises(ValueError, match="only ranges of positions"):
        ha.Method(ha.TopBlocks(2, 8), DrawAlike(16))
    with pytest.raises(ValueError, match="put them last"):
        ha.Method(DrawAlike(16), ha.Draw(16))


@pytest.mark.parametrize("stage", [ha.HashBuckets(16), DrawAlike(16)], ids=repr)
def test_lists_of_a_stage_with_tiles_of_its_own_are_never_left_out(stage):
    method, given = ha.Method(ha.Window(16), stage, tile=16), problem(100)
    with pytest.raises(ValueError, match="would leave out the keys .* use selections"):
        method.select(given)
    assert len(method.selections(given)) == 2
