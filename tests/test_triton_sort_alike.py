"""Sorting, grouping and averaging alike queries as a GPU does it: the same lists as PyTorch's, and the same estimates."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alike_choice import choose
from assertions import assert_exact, assert_same_bits
from hyperattention.kernels.choose import triton_choose_alike
from hyperattention.kernels.choose.alike_plan import AlikePlan
from hyperattention.kernels.choose.operator_alike import sorts_alike
from hyperattention.problem import Problem
from hyperattention.select import DrawAlike
from hyperattention.select.alike import AlikeTiles, first_directions, sort_alike
from hyperattention.select.score import alike_fused
from hyperattention.select.score.alike_fused import BOUND, FusedBlocks, FusedSort, fused_first
from hyperattention.select.score.alike_scan import AlikeScan
from hyperattention.select.score.key_blocks import blocks_of
from hyperattention.select.score.key_metric import KeyMetric
from hyperattention.select.score.pooling import edges_of
from hyperattention.select.score.principal import principal_directions
from hyperattention.select.stage import CoveredKeys
from hyperattention.tiling import Tiles, cut
from problems import problem

pytestmark = pytest.mark.usefixtures("triton_kernel")
TILE = 32


@pytest.fixture(autouse=True)
def one_precision(monkeypatch):
    """Estimates in float32 on both sides."""
    monkeypatch.setattr(alike_fused, "dtype_of_estimates", lambda device: torch.float32)


def late(given: Problem, offset: int) -> Problem:
    return replace(given, q=given.q[:, :, offset:], offset=offset)


def metric_of(tiles: Tiles) -> KeyMetric:
    """Two covariances beside the identity for 32 keys or more, which the tiles take that see so many."""
    return KeyMetric.of(tiles.problem.k.flatten(0, 1), 8)


def sorted_as_torch(tiles: Tiles, many: int) -> AlikeTiles:
    return sort_alike(tiles, many, metric=metric_of(tiles).of_tiles(tiles.by_list(tiles.known)))[0]


def sort_of(tiles: Tiles, many: int, metric: KeyMetric) -> FusedSort:
    edges = edges_of(tiles, CoveredKeys()).of_tile
    return FusedSort.of(tiles, many, metric, first_of(tiles, many)[1], edges)


def first_of(tiles: Tiles, many: int = 1, num: int = 24) -> tuple[Tensor, ...]:
    k, v = (x.flatten(0, 1) for x in (tiles.problem.k, tiles.problem.v))
    return fused_first(k, v, num, tiles, many)


def centres_of(k: Tensor, v: Tensor, num: int) -> Tensor:
    """Averages alone: what else is computed depends on other things."""
    return first_of(cut(Problem(k[None], k[None], v[None], 1.0), TILE), 1, num)[0]


def separated(given: Problem, many: int) -> Problem:
    """Queries of a few directions, which come in any order; lengths are unlike, so that no cut has a choice."""
    count = given.q[0, ..., 0].numel()
    way = torch.randperm(count, generator=torch.Generator().manual_seed(0)).view(given.q.shape[1:3])
    turned = torch.linalg.qr(torch.randn(given.q.shape[3], 2, generator=torch.Generator().manual_seed(1)))[0]
    angle = (way % many + 0.4) * 6.28 / many
    far = torch.stack([9 * angle.cos(), 5 * angle.sin()], 2)
    return replace(given, q=given.q * 0.02 + (far @ turned.T + 3.0).to(given.q.dtype))


@pytest.mark.parametrize(
    ("given", "many"),
    [
        pytest.param(problem(64, heads=4, kv_heads=1, head_dim=40), 4, id="more numbers than directions"),
        pytest.param(problem(64, heads=4, kv_heads=2, batch=2), 4, id="fewer"),
    ],
)
def test_queries_of_one_direction_share_a_list(given, many):
    given = separated(given, many)
    tiles = cut(given, TILE)
    ordered = sort_of(tiles, many, metric_of(tiles))
    expected = sorted_as_torch(tiles, many)
    # inside a list any order will do
    assert_same_bits(ordered.alike.source.sort(2)[0], expected.source.sort(2)[0])
    assert ordered.alike.live.all()
    # the order of positions would be another
    assert not torch.equal(ordered.alike.source.flatten(1).sort(1)[0], ordered.alike.source.flatten(1))


def test_directions_are_those_of_rounded_queries_far_from_the_origin():
    """The mean, which all rows share, takes none of the directions; they differ in sixteen."""
    size = torch.where(torch.arange(32) < 16, 1.0, 0.05)
    given = problem(32, heads=2, kv_heads=1, head_dim=32)
    given = replace(given, q=(given.q * size + 40 * torch.ones(32)).bfloat16(), k=given.k.bfloat16(), v=given.v.bfloat16())
    tiles = cut(given, TILE)
    ordered = sort_of(tiles, 1, KeyMetric.of(given.k[0], 99))
    directions = ordered.directions[0, 0].float()
    x = given.q[0].flatten(0, 1).float()
    x = x - x.mean(0)
    best = torch.linalg.svd(x)[2][:16]
    # directions are rounded on the way, at last to bfloat16 for the product with the factor
    assert (x @ directions.T).square().sum() > 0.99 * (x @ best.T).square().sum()
    eps = torch.finfo(torch.bfloat16).eps
    assert (directions @ directions.T - torch.eye(16)).abs().max() < 2 * eps


def test_each_tile_takes_the_factor_of_the_most_keys_that_it_knows():
    tiles = cut(problem(128, kv_heads=1, head_dim=8), TILE)
    # 20 and 80 leading keys, of which tiles know 0, 32, 64 and 96
    metric = KeyMetric(torch.eye(8).expand(1, 3, -1, -1) * torch.tensor([1.0, 2.0, 4.0])[:, None, None], 20)
    assert sort_of(tiles, 1, metric).directions.amax((0, 2, 3)).tolist() == [1.0, 2.0, 2.0, 4.0]
    assert metric.number(tiles.by_list(tiles.known))[0].tolist() == [0, 1, 1, 2]


def spoilt(given: Problem) -> Problem:
    q = given.q.clone()
    q[:, 0, 5:9] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38])[:, None]
    return replace(given, q=q)


@pytest.mark.parametrize(
    ("given", "many"),
    [
        pytest.param(late(problem(66, heads=3, kv_heads=1, head_dim=20), 37), 5, id="a chunk in five lists"),
        pytest.param(problem(50, heads=3, kv_heads=1, batch=2), 7, id="seven lists"),
        pytest.param(problem(33, kv_heads=1), 1, id="one list"),
        pytest.param(spoilt(problem(60, heads=2, kv_heads=1)), 4, id="no numbers"),
        pytest.param(problem(40, heads=2, kv_heads=1, causal=False), 4, id="all keys"),
    ],
)
def test_every_query_has_one_row(given, many, monkeypatch):
    tiles = cut(given, TILE)
    made = choose(monkeypatch, tiles, many, 2, metric_of(tiles))
    ordered = made.ordered
    alike, group = ordered.alike, given.group
    expected = sorted_as_torch(tiles, many)
    assert alike.source.shape == expected.source.shape
    for source, live in zip(alike.source, alike.live, strict=True):
        assert_same_bits(source[live].sort()[0], torch.arange(group * given.num_queries))
    # rows of a tile stay in it, and see what they saw
    of_tile = tiles.by_list(tiles.limit).repeat_interleave(group, 2)
    inside = alike.inside.unflatten(1, (-1, many)).flatten(2)
    limit = of_tile.gather(2, inside).view_as(alike.inside).masked_fill(~alike.live, 0)
    assert_same_bits(ordered.row_limit, limit)
    position = torch.arange(len(tiles.index))[:, None] * TILE + inside // group - tiles.front
    live = alike.live.unflatten(1, (-1, many)).flatten(2)
    source = alike.source.unflatten(1, (-1, many)).flatten(2)
    assert_same_bits(source[live], (inside % group * given.num_queries + position)[live])
    assert_same_bits(alike.restore(alike.arrange(given.q)).nan_to_num(), given.q.nan_to_num())
    assert all(torch.isfinite(x).all() for x in (made.query, made.log_rows))
    assert (made.index >= 0).all()


@pytest.mark.parametrize("numbers", [2**13, 2**9], ids=["whole queries", "slices of them"])
def test_averages_are_those_of_the_same_lists(numbers, monkeypatch):
    monkeypatch.setattr(triton_choose_alike, "_NUMBERS", numbers)
    given = problem(64, heads=4, kv_heads=2, head_dim=24)
    tiles, many, groups = cut(given, TILE), 2, 5
    made = choose(monkeypatch, tiles, many, groups, metric_of(tiles))
    rows = (made.ordered.alike.arrange(given.q) * given.scale).unflatten(1, (-1, many))
    # rows of lists in any order, which have the directions of their tile
    compared = rows @ metric_of(tiles).of_tiles(tiles.by_list(tiles.known))[:, :, None]
    directions = principal_directions(compared.flatten(2, 3).flatten(0, 1), 16).unflatten(0, rows.shape[:2])
    scan = AlikeScan.of(tiles, rows, compared @ directions[:, :, None], groups)
    assert_exact(made.query, scan.query)
    assert_exact(made.spread, scan.spread)
    assert_exact(made.log_rows, scan.log_rows, size=1.0)


def plan_of(keys: int, levels: int) -> AlikePlan:
    return AlikePlan(TILE, 0, 1, 1, keys, 8, levels, 1, 1, 2, 4, 8, 3, 1)


def test_blocks_are_those_of_the_cpu():
    given = problem(299, kv_heads=2, head_dim=24, value_dim=40)
    given.k[0, 0, 50] = torch.inf
    given.v[0, 1, 60] = torch.nan
    # a value in the centre
    given.v[0, 0, 70] = given.v[0, 0, :24].mean(0)
    k, v = (x.flatten(0, 1) for x in (given.k, given.v))
    ours = FusedBlocks.of(k, v, centres_of(k, v, 24), plan_of(299, 4))
    expected, before = blocks_of(k, v, (1, 4, 16, 64), 24), 0
    for size, blocks in expected.items():
        # whole blocks alone
        behind = before + 299 // size
        assert_exact(ours.keys[:, before:behind], blocks.mean)
        assert_exact(ours.log_value[:, before:behind], blocks.log_value)
        if blocks.variance is not None:
            assert_exact(ours.variance[:, before - 299 : behind - 299], blocks.variance)
            direct = k[1, : 299 // size * size].unflatten(0, (-1, size)).double().var(1, unbiased=False)
            assert_exact(blocks.variance[1], direct.float())
        before = behind
    assert ours.keys.shape[1] == before


def test_blocks_need_no_usual_distance():
    """Values that are all the same, but for one."""
    given = problem(40, kv_heads=1)
    v = torch.ones_like(given.v[0])
    v[0, 30] = 5.0
    k = given.k[0]
    ours = FusedBlocks.of(k, v, centres_of(k, v, 24), plan_of(40, 1))
    assert_exact(ours.log_value, blocks_of(k, v, (1,), 24)[1].log_value)


@pytest.mark.parametrize("sharp", [1.0, 6.0])
@pytest.mark.parametrize("most", [390, 40, 6], ids=["keys", "opened", "three times opened"])
def test_bars_are_sums_over_closed_blocks_and_keys_of_opened_ones(most, sharp, monkeypatch):
    # more blocks than are read at once, and a program has more averages than are compared at once
    monkeypatch.setattr(triton_choose_alike, "_SUMMED", 16)
    monkeypatch.setattr(triton_choose_alike, "_ROWS", 16)
    given = problem(390, heads=2, kv_heads=1, head_dim=24)
    tiles = cut(replace(given, q=given.q * sharp), TILE)
    candidates = 200
    made = choose(monkeypatch, tiles, 1, 18, most=most, candidates=candidates)
    # the first tile sees no key
    assert (made.bar[:, 0] == -BOUND).all()
    k, close = given.k[0, 0].double() - given.k[0, 0, :24].mean(0).double(), 0
    for tile in (1, 6, 12):
        exact = (made.query[0, tile, 0].double() @ k[: tile * TILE].T).logsumexp(1)
        off = (made.bar[0, tile, 0] + made.log_rows[0, tile, 0] - exact).abs()
        assert off.max() < (1e-4 if most == 390 else 20.0)
        close += (off < 0.1).double().mean() / 3
    # most sums are those of the keys in opened blocks
    assert close > 0.7


def test_noise_has_the_same_bits():
    given = replace(problem(70, batch=2, heads=6, kv_heads=3), seed=2**40 + 5, layer=3)
    for x in (given, replace(given, heads=(7, 2, 2**35 + 1)), late(given, 40)):
        tiles = cut(x, TILE)
        _, _, noise, key_row = first_of(tiles, 5)
        assert_same_bits(noise, DrawAlike(8)._noise(tiles, 5)[..., 0])
        assert_same_bits(key_row, torch.arange(6))


def test_directions_to_begin_with_have_the_same_bits():
    tiles = cut(problem(32, head_dim=200), TILE)
    expected = first_directions(tiles.problem).float()
    # some in both tails, and some between them
    assert (expected < -1.2).any()
    assert (expected > 1.2).any()
    assert_same_bits(first_of(tiles)[1], expected)
    assert_same_bits(first_of(cut(problem(32, head_dim=8), TILE))[1], torch.eye(8, 16))


@pytest.mark.parametrize(
    ("rows", "each", "width", "sorts"),
    [(512, 64, 128, True), (512, 128, 256, True), (640, 64, 128, True), (1024, 64, 128, True), (1025, 64, 64, False),
     (512, 16, 128, False), (256, 256, 128, True), (256, 256, 256, False), (1, 64, 8, True)],
)  # fmt: skip
def test_large_tiles_are_left_to_torch(rows, each, width, sorts):
    assert sorts_alike(rows, each, width) == sorts


@pytest.mark.parametrize("dim", [5, 16, 24, 40, 144])
def test_factors_of_leading_keys_are_those_of_torch(dim):
    g = torch.Generator().manual_seed(dim)
    k = torch.randn(2, 150, dim, generator=g) * torch.linspace(0.5, 3, dim) + 4
    k[1, 3, 1] = torch.nan
    ours = alike_fused.fused_metric(k, centres_of(k, k, 7), 7)
    theirs = KeyMetric.of(k, 7)
    assert ours.factor.shape == theirs.factor.shape == (2, 1 + 3, dim, dim)  # 7, 28 and 112 keys
    for at, count in enumerate((0, 7, 28, 112)):
        a, b = (x.factor[:, at].double() for x in (ours, theirs))
        assert (a == a.tril()).all()
        # seven keys span fewer directions than 16: there the ridge is all that a factor stands for, and rounding decides
        torch.testing.assert_close(a @ a.transpose(1, 2), b @ b.transpose(1, 2), rtol=1e-4, atol=2e-5)
        if count > dim:
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_factors_do_not_depend_on_later_keys_and_are_the_identity_where_nothing_is_told():
    g = torch.Generator().manual_seed(1)
    k = torch.randn(2, 100, 8, generator=g)
    other, huge = k.clone(), k.clone()
    other[:, 28:] = torch.inf
    huge[0] *= 1e25
    given, later = (alike_fused.fused_metric(x, centres_of(x, x, 7), 7).factor for x in (k, other))
    assert_same_bits(given[:, :3], later[:, :3])
    assert_same_bits(
        alike_fused.fused_metric(huge, centres_of(huge, huge, 7), 7).factor[0, 1:], torch.eye(8).expand(2, -1, -1)
    )
    few = alike_fused.fused_metric(k[:, :5], centres_of(k[:, :5], k[:, :5], 7), 7).factor
    assert_same_bits(few, torch.eye(8).expand(2, 1, -1, -1))
