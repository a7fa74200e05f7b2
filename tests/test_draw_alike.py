"""Queries that look for similar keys share a list: how they are sorted and grouped, and what is drawn for them."""

from dataclasses import replace

import pytest
import torch

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_unbiased
from hyperattention.problem import Problem
from hyperattention.select import DrawAlike
from hyperattention.select.alike import sort_alike
from hyperattention.select.score.alike_scan import AlikeScan
from hyperattention.select.score.groups import grouped
from hyperattention.select.score.key_blocks import blocks_of
from hyperattention.select.score.pooling import edges
from hyperattention.select.stage import CoveredKeys
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


@pytest.mark.parametrize("size", [1, 4, 16])
def test_no_query_knows_of_keys_in_its_tile_or_after(size):
    given = problem(200, causal=True)
    later = replace(given, k=given.k.clone(), v=given.v.clone())
    tile = 4
    later.k[:, :, tile * TILE :], later.v[:, :, tile * TILE :] = 9.0, 5.0
    found = []
    for each in (given, later):
        tiles = cut(each, TILE)
        _, query, few = sort_alike(tiles, 4)
        blocks = blocks_of(each.k.flatten(0, 1), each.v.flatten(0, 1), (1, 4, 16), 24)
        part = slice(tile, tile + 1)
        left = tuple(x[:, part] for x in edges(tiles, CoveredKeys()))
        found.append(AlikeScan.of(tiles, query, few, 4).shares(part, blocks, left, size, 40))
    (index, share), (same, as_before) = found
    assert_same_bits(same, index)
    assert_same_bits(as_before, share)
    known = index[index < 200]
    assert (known < tile * TILE).all()
    assert len(known) == len(index) * (tile * TILE if size == 1 else 40)


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
    method = ha.Method(ha.Window(8), DrawAlike(40, rows=12, pooled=5, most=12, candidates=1), tile=15)
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
