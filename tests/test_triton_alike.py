"""Draws for alike queries as a GPU makes them: shares of keys equal those of the CPU, and draws follow the same law."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hyperattention as ha
from alike_choice import Chosen, choose
from assertions import assert_exact, assert_same_bits
from hyperattention.kernels.choose import alike_plan
from hyperattention.kernels.choose.triton_candidates import find_largest
from hyperattention.kernels.choose.triton_draw_alike import draw_lists
from hyperattention.problem import Problem
from hyperattention.select import DrawAlike, draw_alike
from hyperattention.select.score import alike_fused
from hyperattention.select.score.alike_scan import AlikeScan
from hyperattention.select.score.block_sizes import BlockSizes
from hyperattention.select.score.candidates import Candidates
from hyperattention.select.score.key_blocks import KeyBlocks, blocks_of
from hyperattention.select.score.pooling import edges
from hyperattention.select.stage import CoveredKeys
from hyperattention.tiling import cut
from problems import problem, tensors

pytestmark = pytest.mark.usefixtures("triton_kernel")
TILE = 32


@pytest.fixture(autouse=True)
def one_precision(monkeypatch):
    """Estimates in float32 on both sides: rounded ones would be rounded at other places."""
    monkeypatch.setattr(alike_fused, "dtype_of_estimates", lambda device: torch.float32)


def masked(given: Problem, live: int) -> Problem:
    """Hide some keys, in normal form: live keys first."""
    shown = torch.rand(given.k.shape[0], given.num_keys, generator=torch.Generator().manual_seed(1)) < live / given.num_keys
    return replace(given, rank=shown.cumsum(1))


def chunk_of_a_prompt(given: Problem, offset: int) -> Problem:
    return replace(given, q=given.q[:, :, offset:], offset=offset)


def strided(given: Problem) -> Problem:
    """The same as ``[tokens, heads, width]`` in memory, seen by head."""
    return replace(given, **{name: getattr(given, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"})


def scan_of(given: Problem, groups: int, many: int, most: int, candidates: int, monkeypatch) -> tuple[Chosen, AlikeScan]:
    """A choice, and what PyTorch would score by its averages."""
    tiles = cut(given, TILE)
    made = choose(monkeypatch, tiles, many, groups, most=most, candidates=candidates)
    # all is the kernel's
    return made, AlikeScan(tiles, made.query.float(), made.spread.float(), made.log_rows, 0)


@pytest.mark.parametrize(
    ("given", "groups", "many", "most", "candidates"),
    [
        pytest.param(problem(100, heads=1, kv_heads=1, head_dim=64), 8, 2, 99, 9, id="one head in a group"),
        pytest.param(chunk_of_a_prompt(problem(150, heads=3, kv_heads=1, head_dim=80), 37), 5, 3, 40, 33, id="a chunk"),
        pytest.param(
            strided(problem(70, heads=4, kv_heads=1, head_dim=128, causal=False)), 4, 4, 99, 9, id="all keys, strided"
        ),
        pytest.param(problem(101, heads=2, kv_heads=1, head_dim=24, causal=False), 4, 2, 30, 21, id="all keys in blocks"),
        pytest.param(masked(problem(130, heads=2, kv_heads=1, batch=2), 90), 3, 2, 16, 10, id="masked keys, twice opened"),
        pytest.param(problem(190, kv_heads=1), 3, 1, 20, 3, id="one list, twice opened"),
    ],
)
def test_keys_and_their_shares_are_those_of_the_cpu(given, groups, many, most, candidates, monkeypatch):
    made, scan = scan_of(given, groups, many, most, candidates, monkeypatch)
    tiles, sizes, seen, inner, outer = scan.tiles, BlockSizes(most), set(), 0, 0
    blocks = blocks_of(given.k.flatten(0, 1), given.v.flatten(0, 1), sizes.all(tiles), 24)
    left = edges(tiles, CoveredKeys())
    for tile in range(len(tiles.index)):
        part, size = slice(tile, tile + 1), sizes.of(tiles, slice(tile, tile + 1))
        index, expected = scan.shares(part, blocks, tuple(x[:, part] for x in left), size, candidates)
        # the number of all keys stands for none
        for one, (key, share) in enumerate(zip(index[:, 0], expected[:, 0], strict=True)):
            count = int((key < given.num_keys).sum())
            assert_same_bits(made.numbers[one, tile, :count].long(), key[:count])
            ours, share = made.share[one, tile, :, :count], share[:, :count]
            # logarithms: each share to rounding, however small; the scores under it are sums of products this large
            size_of_scores = (scan.query.norm(dim=-1).max() * blocks[1].mean.norm(dim=-1).max()).item()
            assert_exact(ours.log(), share.log(), size=1 + size_of_scores)
            # a program writes zeros behind them
            assert (made.share[one, tile, :, count : -(-count // 16) * 16] == 0).all()
            inner, outer = inner + (share < 1).sum(), outer + share.numel()
            if size == 1:
                assert count == int(tiles.by_list(tiles.known)[one, tile])
            else:
                # most blocks stay closed, but where they are few
                assert count <= candidates + 6
                seen.add(size) if count > candidates // 2 else None
    # many are neither unknown nor as large as a share can be
    assert inner > 0.2 * outer > 0
    assert seen == {4, 16}.intersection(sizes.all(tiles)) or not given.causal


def test_shares_are_rounded_by_a_few_steps_of_bfloat16(monkeypatch):
    monkeypatch.setattr(alike_fused, "dtype_of_estimates", lambda device: torch.bfloat16)
    given = problem(100, heads=4, head_dim=64)
    made, scan = scan_of(given, 4, 2, 2**20, 9, monkeypatch)
    # what the kernel is given rounded is rounded here: only squares and shares remain
    keys, part = made.blocks.keys.float(), slice(0, len(scan.tiles.index))
    blocks = {1: KeyBlocks(1, keys, None, None, made.blocks.log_value)}
    left = edges(scan.tiles, CoveredKeys())
    index, expected = scan.shares(part, blocks, left, 1, 9)
    assert made.share.dtype == torch.bfloat16
    width = keys.shape[2]
    extra = (2 * (scan.spread[..., :width] @ keys.square()[:, None].transpose(2, 3)).sqrt()).amax() + 2
    there = (index < 100)[:, :, None].expand_as(expected)
    off = (made.share[..., : index.shape[2]].float()[there].log() - expected[there].log()).abs()
    # a step for the share, and one for the squares under the root of the allowance
    assert (off <= torch.finfo(torch.bfloat16).eps * (1 + extra)).all()


@triton.jit
def _found(share_ptr, numbers_ptr, found_ptr, written_ptr, count, most, BITS: tl.constexpr, DIGIT: tl.constexpr):
    tl.store(written_ptr, find_largest(share_ptr, numbers_ptr, found_ptr, count, most, BITS, DIGIT, 16, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "most"), [(100, 7), (65, 64), (64, 64), (33, 40), (1, 1), (0, 3)])
def test_the_largest_shares_are_found_without_a_sort(count, most, dtype):
    generator = torch.Generator().manual_seed(count)
    share = torch.rand(count, generator=generator).mul(8).exp().to(dtype)
    # equal ones, none at all, and some that are never found
    share[::3] = 5.0
    share[1::7], share[2::5] = 0.0, -1.0
    numbers, written = torch.full((most,), -7, dtype=torch.int32), torch.full((1,), -7, dtype=torch.int32)
    given, of_shares = torch.nn.functional.pad(share, (0, 3), value=100.0), 3 * torch.arange(count, dtype=torch.int32)
    _found[(1,)](given, of_shares, numbers, written, count, most, 8 * dtype.itemsize, 3)
    # of equal shares the first
    order = share.double().sort(descending=True, stable=True)[1]
    expected = order[: min(most, int((share >= 0).sum()))].sort()[0]
    assert written == len(expected)
    assert_same_bits(numbers[: len(expected)].long(), 3 * expected)


NUM, POINTS = 24, 10
EDGES = {
    "one side": (3, 90, 90, 90),
    "both sides of a hole": (3, 40, 61, 97),
    "a hole inside a block": (0, 41, 42, 100),
    "few keys": (5, 20, 30, 37),
    "as many keys as draws": (5, 29, 29, 29),
    "nothing left": (0, 0, 0, 0),
}


@triton.jit
def _draws(
    share_ptr, numbers_ptr, edges_ptr, noise_ptr, index_ptr, weight_ptr, low_ptr, high_ptr, counts_ptr, room, most, num,
    MANY: tl.constexpr,
):  # fmt: skip
    """The lists of a tile at a time."""
    tile = tl.program_id(0)
    count = tl.load(counts_ptr + tile)
    draw_lists(
        share_ptr + tile * MANY * room, numbers_ptr + tile * most, edges_ptr + tile * 5, noise_ptr, index_ptr, weight_ptr,
        low_ptr, high_ptr, tile * MANY, MANY, count, room, num, 0.2, 1e-30,
        16, 4, 2**30, 57, 16, 16, 16, 6,
    )  # fmt: skip


def masses(kind: str, blocks: int) -> torch.Tensor:
    share = torch.rand(blocks, generator=torch.Generator().manual_seed(0)).pow(8)
    if kind == "nothing scored":
        return share * 0
    # more than one key takes a draw of its own, one after the other as the law is cut
    return share.index_fill(0, torch.tensor([5, 9]) % blocks, 1.0) if kind == "peaks" else share


def some_of(left: tuple[Tensor, ...], most: int) -> Tensor:
    """Some of the keys that are left to each tile, ascending, and 100 behind them where they are fewer."""
    key, (begin, hole_begin, hole_end, end) = torch.arange(100), left
    there = ((key >= begin) & (key < hole_begin)) | ((key >= hole_end) & (key < end))
    rank = torch.rand(there.shape, generator=torch.Generator().manual_seed(1)).masked_fill(~there, -1.0)
    best = rank.topk(most, dim=2)
    return best.indices.masked_fill(best.values < 0, 100).sort(2)[0]


@pytest.mark.parametrize("most", [1, 12, 17, 60])
@pytest.mark.parametrize("kind", ["smooth", "peaks", "nothing scored"])
def test_draws_follow_the_law(most, kind):
    """Over evenly spaced offsets every key is listed as often as expected, and its weight is one over that."""
    tiles = len(EDGES)
    left = tuple(torch.tensor(x)[None, :, None] for x in zip(*EDGES.values(), strict=True))
    found = some_of(left, most)
    counts = (found < 100).sum(2)[0]
    share = masses(kind, most).expand(1, tiles, POINTS, -1).masked_fill((found >= 100)[:, :, None], 0.0)
    # zeros up to a multiple of 16, and nothing to be read behind them
    room = -(-most // 16) * 16 + 16
    given = torch.nn.functional.pad(share, (0, room - most)).index_fill(3, torch.arange(room - 16, room), torch.nan)
    noise = ((torch.arange(POINTS) + 0.5) / POINTS).double().repeat(tiles)
    index, weight = torch.empty(tiles * POINTS, NUM, dtype=torch.int64), torch.empty(tiles * POINTS, NUM)
    low, high = (index.new_empty(tiles * POINTS) for _ in range(2))
    ends = torch.cat([*left, torch.full((1, tiles, 1), 90)], 2)[0].contiguous()
    numbers = found[0].int().masked_fill(found[0] >= 100, -(10**6)).contiguous()
    results = index, weight, low, high
    _draws[(tiles,)](given.flatten(0, 2), numbers, ends, noise, *results, counts, room, most, NUM, POINTS)
    law = Candidates.of(share.clone(), found, left, NUM, 0.2)
    expected = law.share(torch.arange(100).expand(1, tiles * POINTS, -1)).view(tiles, POINTS, 100)[:, 0] * NUM
    index, weight = index.view(tiles, -1), weight.view(tiles, -1)
    for tile, (begin, hole_begin, hole_end, end) in enumerate(EDGES.values()):
        key = torch.arange(100)
        left_over = ((key >= begin) & (key < hole_begin)) | ((key >= hole_end) & (key < end))
        full = weight[tile] > -torch.inf
        listed = torch.bincount(index[tile][full], minlength=100) / POINTS
        if left_over.sum() <= NUM:
            assert_same_bits(listed, left_over.float())
            continue
        assert full.all()
        # a point for each offset may fall on either side of each end of a key
        assert ((listed - expected[tile]).abs() <= 1.01 / POINTS).all()
        assert (listed[~left_over] == 0).all()
        # the law counts in float32, the kernel in fixed point
        assert_exact(weight[tile], -expected[tile][index[tile]].log(), size=10.0)


def chosen(method: ha.Method, given: Problem, *, fused: bool, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    monkeypatch.setattr(draw_alike, "triton_reads", lambda *tensors: fused)
    runs = method.selections(given)[-1][1].runs[-1]
    return runs.first, runs.log_weight


@pytest.mark.parametrize(
    ("given", "stage"),
    [
        pytest.param(problem(90, heads=3, kv_heads=1), DrawAlike(24, 24, 5), id="causal"),
        pytest.param(problem(70, causal=False, batch=2, kv_heads=1), DrawAlike(24, 32, 4), id="all keys"),
        pytest.param(masked(problem(100), 75), DrawAlike(24, 32, 4), id="masked keys"),
        pytest.param(
            problem(90, heads=3, kv_heads=1), DrawAlike(24, 24, 5, most=40, candidates=1), id="candidates of odd lists"
        ),
        pytest.param(problem(130, kv_heads=1), DrawAlike(16, 32, 4, most=10, candidates=1), id="candidates, twice opened"),
        pytest.param(
            problem(100, heads=2, kv_heads=1, causal=False, batch=2),
            DrawAlike(16, 32, 4, most=30, candidates=2),
            id="candidates of all keys",
        ),
        pytest.param(
            chunk_of_a_prompt(problem(150), 37), DrawAlike(24, 16, 3, most=40, candidates=1), id="candidates, a chunk"
        ),
        pytest.param(
            masked(problem(120, batch=2, heads=2, kv_heads=1), 90),
            DrawAlike(15, 32, 4, most=40, candidates=1),
            id="candidates, masked keys",
        ),
        pytest.param(
            problem(100, heads=1, kv_heads=1),
            DrawAlike(16, 32, 4, most=40, candidates=12),
            id="candidates, all in one list",
        ),
        # two programs take the lists of a tile; all keys are candidates, whatever averages find them
        pytest.param(
            problem(90, heads=8, kv_heads=1), DrawAlike(12, 16, 9, most=40, candidates=12), id="candidates, lists cut in two"
        ),
    ],
)
def test_a_fused_choice_is_that_of_the_cpu(given, stage, monkeypatch):
    method = ha.Method(ha.Sinks(2), ha.Window(8), stage, tile=TILE)
    (index, weight), (expected, log_weight) = (
        chosen(method, given, fused=fused, monkeypatch=monkeypatch) for fused in (True, False)
    )
    same = index == expected
    # a point may fall on the other side of an edge, by rounding
    assert same.double().mean() > 0.99
    assert_same_bits(weight == -torch.inf, log_weight == -torch.inf)
    here = same & (weight > -torch.inf)
    assert (weight[here] > 0).any() or (weight[here] < 0).any()
    assert_exact(weight[here], log_weight[here], size=10.0)


@pytest.mark.parametrize(("most", "candidates"), [(2**20, 1), (40, 1), (10, 1)], ids=["keys", "opened", "twice opened"])
def test_the_number_of_programs_changes_no_bit(most, candidates, monkeypatch):
    method = ha.Method(ha.Window(8), DrawAlike(24, 32, 4, most=most, candidates=candidates), tile=TILE)
    found = []
    for many in (1, 2**20):
        monkeypatch.setattr(alike_plan, "_multiprocessors", lambda device, many=many: many)
        found.append(chosen(method, problem(130, kv_heads=1), fused=True, monkeypatch=monkeypatch))
    for one, three in zip(*found, strict=True):
        assert_same_bits(one, three)


class Captured(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hyperattention":
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("pooled", "head_dim", "reads", "operators"),
    [
        (16, 128, True, 5), (17, 128, True, 0), (8, 256, True, 5), (9, 192, True, 5), (32, 16, True, 0), (4, 8, False, 0),
        (16, 8, True, 5),
    ],
)  # fmt: skip
def test_kernels_run_where_they_support_the_call(pooled, head_dim, reads, operators, monkeypatch):
    monkeypatch.setattr(draw_alike, "triton_reads", lambda *given: reads)
    q, k, v = (x.to("meta") for x in tensors(200, heads=4, kv_heads=2, head_dim=head_dim))
    with Captured() as captured:
        ha.Method(DrawAlike(24, 32, pooled), tile=TILE).selections(Problem(q, k, v, 0.3, causal=True))
    assert len(captured.calls) == operators


@pytest.mark.parametrize("most", [40, 100])
def test_operators_are_registered_soundly(most, monkeypatch):
    method = ha.Method(DrawAlike(24, 32, 4, most=most, candidates=1), tile=TILE)
    with Captured() as captured:
        chosen(method, problem(64), fused=True, monkeypatch=monkeypatch)
    assert len(captured.calls) == 5
    for operator, args in captured.calls.items():
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
