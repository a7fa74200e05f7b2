"""Heads of a large group, sorted in parts on a GPU: each part is chosen for as if its keys were its own."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hyperattention as ha
from assertions import assert_same_bits
from hyperattention.kernels.choose import operator_alike
from hyperattention.kernels.choose.operator_alike import parts_of
from hyperattention.problem import Problem
from hyperattention.select import DrawAlike, draw_alike
from hyperattention.select.score import alike_fused
from hyperattention.select.score.alike_fused import (
    FusedBlocks,
    FusedSort,
    fused_choice,
    fused_first,
    fused_metric,
    fused_plan,
)
from hyperattention.select.score.block_sizes import BlockSizes
from hyperattention.select.score.pooling import edges_of
from hyperattention.select.stage import CoveredKeys
from hyperattention.tiling import cut
from problems import problem

TILE, NUM, GROUPS = 32, 24, 3


@pytest.fixture
def one_precision(monkeypatch):
    monkeypatch.setattr(alike_fused, "dtype_of_estimates", lambda device: torch.float32)


@pytest.mark.parametrize(
    ("group", "width", "parts"),
    [(1, 128, 1), (8, 256, 1), (9, 128, 3), (16, 128, 2), (16, 256, 2), (32, 128, 4), (71, 64, 71), (4, 1024, None)],
)
def test_groups_of_more_than_eight_heads_are_divided(group, width, parts):
    assert parts_of(128, group, 64, width) == parts


def chosen(
    given: Problem, many: int, parts: int, noise: Tensor | None = None
) -> tuple[FusedSort, Tensor, tuple[Tensor, ...]]:
    """Sort and draw in kernels; the noise, and keys with their weights and edges."""
    tiles = cut(given, TILE)
    edges, k, v = edges_of(tiles, CoveredKeys()).of_tile, given.k.flatten(0, 1), given.v.flatten(0, 1)
    centres, begin, own_noise, _ = fused_first(k, v, NUM, tiles, many)
    ordered = FusedSort.of(tiles, many, fused_metric(k, centres, NUM), begin, edges, parts)
    plan = fused_plan(tiles, BlockSizes(10), many, GROUPS, 6, parts)
    shape = (len(k), len(tiles.index) * many)
    index, low, high = (torch.empty(x, dtype=torch.int64) for x in ((*shape, NUM), shape, shape))
    results = index, torch.empty((*shape, NUM)), low, high
    noise = own_noise if noise is None else noise
    fused_choice(given, ordered, edges, noise, FusedBlocks.of(k, v, centres, plan), results, plan, 0.1)
    return ordered, noise, results


@pytest.mark.heavy  # many interpreted programs
@pytest.mark.usefixtures("triton_kernel", "one_precision")
def test_a_part_is_chosen_for_as_if_its_keys_were_its_own():
    given, parts, many = problem(40, heads=6, kv_heads=1, head_dim=8, batch=2), 2, 6
    apart = replace(given, k=given.k.repeat_interleave(parts, 1), v=given.v.repeat_interleave(parts, 1))

    def by_part(x: Tensor) -> Tensor:
        """Turn lists of tiles, ``[2, tiles * many, ...]``, into ``[2 * parts, tiles * many / parts, ...]``."""
        return x.unflatten(1, (-1, parts, many // parts)).transpose(1, 2).flatten(0, 1).flatten(1, 2)

    ordered, noise, results = chosen(given, many, parts)
    expected, _, expected_results = chosen(apart, many // parts, 1, by_part(noise).contiguous())
    for ours, theirs in zip(results, expected_results, strict=True):
        assert_same_bits(by_part(ours), theirs)
    # queries and places are counted over the heads of the whole group
    before = 3 * (torch.arange(4) % parts)[:, None, None]
    assert_same_bits(by_part(ordered.alike.source), expected.alike.source + before * 40)
    inside = expected.alike.inside
    assert_same_bits(by_part(ordered.alike.inside), inside // 3 * 6 + before + inside % 3)
    assert_same_bits(by_part(ordered.row_limit), expected.row_limit)
    assert_same_bits(by_part(ordered.alike.live), expected.alike.live)
    assert_same_bits(ordered.alike.restore(ordered.alike.arrange(given.q)), given.q)


@pytest.mark.heavy  # many interpreted programs
@pytest.mark.usefixtures("triton_kernel", "one_precision")
def test_a_method_attends_to_what_parts_are_given(monkeypatch):
    """Lists of all keys in parts: attention is exact, whatever was sorted."""
    monkeypatch.setattr(operator_alike, "_MOST_ROWS", 64)
    monkeypatch.setattr(draw_alike, "triton_reads", lambda *tensors: True)
    given = problem(70, heads=6, kv_heads=1)
    method = ha.Method(ha.Sinks(2), ha.Window(8), DrawAlike(70, rows=16, pooled=2), tile=TILE)
    seen = []
    monkeypatch.setattr(draw_alike, "parts_of", lambda *sizes: seen.append(parts_of(*sizes)) or seen[-1])
    out = method.attend(given).out
    assert seen == [3]
    torch.testing.assert_close(out, ha.Exact().attend(given).out, rtol=1e-4, atol=1e-5)
