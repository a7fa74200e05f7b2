"""Parts of a hierarchical search as a GPU does them: the same blocks, representatives and directions as PyTorch's."""

from dataclasses import replace

import pytest
import torch

from assertions import assert_exact, assert_same_bits
from hyperattention.error import audit, interval
from hyperattention.error.audit import sample_rows
from hyperattention.kernels.choose.operator_search import key_basis, open_blocks, represent, uniform_of_tiles
from hyperattention.random import hash_state, uniform
from hyperattention.select.score import hierarchical_search, search_fused
from hyperattention.select.score.level import Level
from hyperattention.select.score.pooling import any_left
from hyperattention.select.score.principal import ROUNDS, principal_directions
from hyperattention.select.score.representatives import Representatives
from hyperattention.select.score.search_fused import FusedSearch, noise_of
from hyperattention.tiling import cut
from problems import problem

pytestmark = pytest.mark.usefixtures("triton_kernel")


def keys_of(dim: int, count: int = 90) -> torch.Tensor:
    return torch.randn(2, count, dim, generator=torch.Generator().manual_seed(dim)) * torch.linspace(3, 0.3, dim) + 5.0


@pytest.mark.parametrize(("dim", "width"), [(24, 7), (16, 16), (40, 12)])
def test_directions_are_those_of_torch(dim, width):
    k = keys_of(dim)
    head = k[:, :70]
    middle, basis = key_basis(k, 70, width, 2 * ROUNDS, int(hash_state(())))
    assert_exact(middle, head.mean(1, keepdim=True), size=10.0)
    assert_exact(basis.transpose(1, 2) @ basis, torch.eye(width).expand(2, -1, -1), size=1.0)
    # the same space: what is left of the one beside the other is rounding, of covariances that differ a hundredfold
    expected = principal_directions(head.double(), width)
    outside = expected - basis.double() @ (basis.double().transpose(1, 2) @ expected)
    assert outside.norm(dim=1).max() < 1e-4


@pytest.mark.parametrize("k", [torch.zeros(1, 9, 8), torch.ones(1, 1, 8) * 1e20, torch.full((1, 9, 8), torch.nan)], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_directions_of_next_to_nothing_are_finite(k):
    assert torch.isfinite(key_basis(k, 9, 4, 2 * ROUNDS, 5)[1]).all()


def test_without_directions_there_is_a_mean():
    k = keys_of(8)
    middle, basis = key_basis(k, 1000, 0, 0, 0)
    assert basis.shape == (2, 8, 0)
    torch.library.opcheck(key_basis, (k, 30, 4, 4, 7), test_utils=("test_schema", "test_faketensor"))
    assert_exact(middle, k.mean(1, keepdim=True), size=10.0)


LEVELS = (
    (Level(64, 6, Representatives(4, 5)), Level(16, 4, Representatives(2, 3)), Level(8, 4, Representatives(1, 2))),
    # far keys of the coarse level come from all of its keys: too few below
    (Level(32, 6, Representatives(2, 5)), Level(8, 4, Representatives(1, 1))),
    (Level(32, 6, Representatives(1, 3)), Level(8, 4, Representatives(2, 0))),
    (Level(16, 4),),
)


@pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: f"{len(levels)} levels, {levels[0].by.far} far keys")
def test_representatives_and_moments_are_those_of_torch(levels, monkeypatch):
    monkeypatch.setattr(search_fused, "dtype_of_estimates", lambda device: torch.float32)
    keys = torch.randn(2, 128, 12, generator=torch.Generator().manual_seed(0))
    # a block of zeros fills places
    keys[:, -levels[0].block_size :] = 0.0
    tiles = cut(problem(32), 16)
    given = FusedSearch(levels, tiles, torch.zeros(2, 2, 5, dtype=torch.int64), 0, keys[:, :2, None], keys, 8, 0.1)
    summaries, moments = given.blocks
    expected = hierarchical_search._summaries(keys, levels)
    assert len(summaries) == len(levels)
    for ours, theirs in zip(summaries, expected, strict=True):
        assert_exact(ours, theirs)
    for ours, theirs in zip(moments, hierarchical_search._moments(keys, levels, expected), strict=False):
        assert_exact(ours, theirs)


def test_means_are_rounded_but_far_keys_to_choose_from_are_not():
    keys = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    summary, far, _ = represent(keys, None, 16, 1, 2, False, torch.float16)
    assert_same_bits(summary[:, :, 1:], far.half())
    found = (far[:, :, :, None] == keys.view(1, 4, 1, 16, 8)).all(-1).any(-1)
    assert found.all()


EDGES = torch.tensor([[3, 40, 61, 97], [0, 41, 44, 100], [5, 29, 29, 29], [0, 0, 0, 0], [0, 200, 200, 200]])


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(("keep", "cut"), [(4, 0), (5, 2), (6, 4), (12, 2)])
def test_opened_blocks_are_the_heaviest_and_those_that_an_edge_cuts(keep, cut, every):
    generator, size, child, number, nothing = torch.Generator().manual_seed(keep), 8, 2, 12, 1000
    mass = torch.rand(1, len(EDGES), number, generator=generator)
    mass[0, 0, 7], mass[0, 1, 2], mass[0, 4, 3] = torch.nan, torch.inf, torch.inf
    first = (torch.arange(number) * size).expand(mass.shape)
    if not every:
        # in an order of their own: some ahead, then the rest ascending
        first = torch.cat([first[..., 5:8], first[..., :5], first[..., 8:]], 2).contiguous()
    edges = torch.cat([EDGES, EDGES[:, 3:]], 1)[None]
    left = tuple(edges[..., at : at + 1] for at in range(4))
    alive, opened = open_blocks(mass, None if every else first, edges, size, keep, cut, nothing, child)
    begin, hole_begin, hole_end, end = left
    whole = ((first >= begin) & (first + size <= hole_begin)) | ((first >= hole_end) & (first + size <= end))
    rank = mass.nan_to_num(nan=0.0).masked_fill(~whole, -1.0).masked_fill(~whole & any_left(first, size, left), torch.inf)
    best, chosen = rank.topk(keep, -1)
    expected = first.gather(2, chosen).masked_fill(best < 0, nothing)
    expected = torch.cat([part.sort()[0] for part in expected.split([cut, keep - cut], 2)], 2)
    assert_same_bits(opened, (expected[..., None] + torch.arange(0, size, child)).flatten(2))
    taken = torch.zeros_like(whole).scatter(2, chosen, best >= 0)
    assert_same_bits(alive.bool(), whole & ~taken)


def test_rows_of_an_audit_are_those_of_the_cpu(monkeypatch):
    expected = sample_rows(70_000, 300, 2**40 + 3, "cpu")
    monkeypatch.setattr(audit, "triton_reads", lambda *tensors: True)
    with pytest.MonkeyPatch.context() as patch:
        # no hash by operators
        patch.setattr(audit, "uniform", None)
        assert_same_bits(sample_rows(70_000, 300, 2**40 + 3, "cpu"), expected)


def test_resamples_of_an_interval_are_those_of_the_cpu(monkeypatch):
    monkeypatch.setattr(interval, "_RESAMPLES", 20)
    expected = interval._exponentials(70, torch.device("cpu"))
    monkeypatch.setattr(interval, "triton_reads", lambda *tensors: True)
    monkeypatch.setattr(interval, "uniform", None)
    assert_same_bits(interval._exponentials(70, torch.device("cpu")), expected)


def test_noise_has_the_bits_of_the_cpu():
    given = replace(problem(70, batch=2, heads=6, kv_heads=3), seed=2**40 + 5, layer=3)
    for x, begun in ((given, 0), (replace(given, heads=(7, 2, 2**35 + 1)), 12)):
        tiles = cut(x, 16)
        counters = x.seed, x.layer, x.head_index[:, None], tiles.index, begun
        assert_same_bits(noise_of(tiles, begun), uniform(counters, "cpu").repeat(2, 1))
    assert len(uniform_of_tiles(None, tiles.index[:0], 2, 3, 5, 0)) == 6
