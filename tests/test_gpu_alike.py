"""A choice for alike queries on a GPU, at real shapes: the kernels beside what PyTorch does on a CPU."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hyperattention as ha
from assertions import assert_same_bits
from hyperattention.kernels.choose.operator_alike import alike_bars
from hyperattention.problem import Problem
from hyperattention.select import DrawAlike, draw_alike
from hyperattention.select.alike import AlikeTiles, first_directions, sort_alike
from hyperattention.select.score.alike_fused import FusedBlocks, FusedSort, fused_first
from hyperattention.select.score.alike_product import HIDDEN
from hyperattention.select.score.alike_scan import DEVIATIONS, NORMAL, AlikeScan, blocks_of
from hyperattention.select.score.key_metric import KeyMetric
from hyperattention.select.score.pooling import edges_of
from hyperattention.select.stage import CoveredKeys
from hyperattention.synthetic import structured
from hyperattention.tiling import Tiles, cut

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def given(tokens: int, group: int, head_dim: int, dtype: torch.dtype) -> Problem:
    x = structured(tokens, heads=2 * group, kv_heads=2, head_dim=head_dim, seed=1, dtype=dtype)
    q, k, v = (t.to(DEVICE) for t in (x.q, x.k, x.v))
    return Problem(q, k, v, head_dim**-0.5, causal=True)


def first_of(tiles: Tiles, many: int, num: int) -> tuple[Tensor, ...]:
    k, v = (x.flatten(0, 1) for x in (tiles.problem.k, tiles.problem.v))
    return fused_first(k, v, num, tiles, many)


def off_by(alike: AlikeTiles, problem: Problem) -> Tensor:
    """Mean square of what rows differ by from the average of their list."""
    rows = alike.arrange(problem.q).float() * problem.scale
    return (rows - rows.mean(2, keepdim=True)).square().sum(3).mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (4, 128), (5, 128), (8, 64), (4, 96), (4, 256), (2, 16)])
def test_lists_are_as_alike_as_those_of_torch(group, head_dim, dtype):
    problem = given(3001, group, head_dim, dtype)
    tiles, many, groups = cut(problem, 128), 2 * group, 8
    metric = KeyMetric.of(problem.k.flatten(0, 1), 500)
    edges, begin = edges_of(tiles, CoveredKeys()).of_tile, first_of(tiles, many, 500)[1]
    ordered, count = FusedSort.empty(tiles, many, metric, begin, edges), len(tiles.index)
    query, spread, log_rows = (torch.cat(x, 1) for x in zip(
        *(ordered.averages(part, groups) for part in (slice(0, 3), slice(3, count))), strict=True
    ))  # fmt: skip
    for source, live in zip(ordered.alike.source, ordered.alike.live, strict=True):
        assert_same_bits(source[live].sort()[0], torch.arange(group * problem.num_queries, device=DEVICE))
    assert_same_bits(ordered.alike.restore(ordered.alike.arrange(problem.q)), problem.q)
    alike, x, few = sort_alike(tiles, many, metric=metric.of_tiles(tiles.by_list(tiles.known)))
    # random inputs have other lists where two rows lie as far along an axis, to rounding: none better than the others
    assert off_by(ordered.alike, problem) <= 1.02 * off_by(alike, problem)
    scan = AlikeScan.of(tiles, x, few, groups)
    width = problem.q.shape[3]
    assert spread[..., :width].double().mean() <= 1.05 * scan.spread[..., :width].double().mean()
    # every row is in one group; 8 groups of a list have one times the mean number of rows
    assert ((2 * log_rows).exp().mean(3) - 1).abs().max() < 1e-4
    assert torch.isfinite(query).all()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_scores_are_compared_with(size, head_dim):
    problem = given(4096 + 77, 4, head_dim, torch.bfloat16)
    tiles, k, v = cut(problem, 128), problem.k.flatten(0, 1), problem.v.flatten(0, 1)
    blocks, expected = FusedBlocks.of(k, v, first_of(tiles, 1, 500)[0], size), blocks_of(k, v, size, 500)
    eps = torch.finfo(torch.bfloat16).eps
    for ours, theirs in ((blocks.keys, expected.keys), (blocks.moments, expected.moments)):
        assert (ours.float() - theirs.float()).norm() <= eps * theirs.float().norm()
    assert (blocks.log_value - expected.log_value).abs().max() < 1e-3
    _, x, few = sort_alike(tiles, 8)
    scan = AlikeScan.of(tiles, x, few, 8)
    known, seen = scan.bars(slice(0, len(tiles.index)), expected)
    log_size = expected.log_size
    edges, query = edges_of(tiles, CoveredKeys()).of_tile, scan.query.bfloat16()
    ours = alike_bars(query, scan.log_rows, blocks.moments, edges, size, NORMAL, log_size, float(-HIDDEN))
    told = known >= NORMAL
    # sums of products of bfloat16: a small part of a nat, beside which estimates allow for deviations
    assert (ours[told] - seen[told]).abs().mean() < 0.05 * DEVIATIONS
    assert (ours[~told] <= HIDDEN).all()


def test_what_is_drawn_at_first_has_the_bits_of_the_cpu():
    tiles = cut(given(3001, 4, 64, torch.bfloat16), 128)
    _, begin, noise, _ = first_of(tiles, 8, 100)
    assert_same_bits(noise, DrawAlike(8)._noise(tiles, 8)[..., 0])
    # logarithms of another library: the last bits of float64, which float32 seldom shows
    assert (begin - first_directions(tiles.problem)).abs().max() < 1e-6


@pytest.mark.parametrize(("tokens", "most"), [(8192, 32_768), (8192, 2048)], ids=["keys", "blocks"])
@pytest.mark.parametrize("group", [4, 6])
def test_the_error_is_that_of_lists_that_torch_chooses(monkeypatch, tokens, most, group):
    problem = given(tokens, group, 128, torch.bfloat16)
    method = ha.Method(ha.Sinks(16), ha.Window(192), DrawAlike(440, most=most), tile=128)
    q, k, v = problem.q, problem.k, problem.v
    exact = scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True)
    errors = []
    for fused in (True, False):
        monkeypatch.setattr(draw_alike, "triton_reads", lambda *tensors, fused=fused: fused)
        each = [
            (ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=method, seed=seed) - exact).norm(dim=-1)
            for seed in range(4)
        ]
        errors.append((torch.stack(each) / exact.norm(dim=-1))[..., tokens // 2 :].mean())
    # means over 4 seeds and all rows of the second half
    assert errors[0] <= 1.05 * errors[1]
