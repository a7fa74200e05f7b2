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
from hyperattention.kernels.choose.triton_candidates import find_candidates
from hyperattention.kernels.choose.triton_draw_alike import draw_lists
from hyperattention.problem import Problem
from hyperattention.select import DrawAlike, draw_alike
from hyperattention.select.score import alike_fused, alike_scan
from hyperattention.select.score.alike_scan import AlikeScan, blocks_of
from hyperattention.select.score.block_sizes import BlockSizes
from hyperattention.select.score.candidates import Candidates, candidates_of
from hyperattention.select.score.scratch import Scratch
from hyperattention.select.score.stretches import stretches_of
from hyperattention.tiling import cut
from problems import problem, tensors

pytestmark = pytest.mark.usefixtures("triton_kernel")
TILE = 32


@pytest.fixture(autouse=True)
def one_precision(monkeypatch):
    """Estimates in float32 on both sides: rounded ones would be rounded at other places."""
    # few blocks tell what scores are compared with, so that short problems have some
    monkeypatch.setattr(alike_scan, "NORMAL", 8)
    monkeypatch.setattr(alike_scan, "integers_are_fast", lambda x: False)
    monkeypatch.setattr(alike_scan, "for_estimates", lambda x: x)
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


def scan_of(given: Problem, groups: int, many: int, most: int, monkeypatch, *candidates: int) -> tuple[Chosen, AlikeScan]:
    """A choice, and what PyTorch would score by its averages."""
    tiles = cut(given, TILE)
    made = choose(monkeypatch, tiles, many, groups, most=most, candidates=candidates or (None, 1, 1))
    # memory for scores, and all else is the kernel's
    scan = AlikeScan.of(tiles, made.query[..., :1, :], made.query[..., :1, :], 1)
    # nothing here is compared, but in as many averages
    compared = scan.compared.expand_as(made.query[..., : scan.compared.shape[-1]])
    own = {"query": made.query.float(), "spread": made.spread.float(), "log_rows": made.log_rows, "compared": compared}
    return made, replace(scan, **own)


@pytest.mark.parametrize(
    ("given", "groups", "many", "most"),
    [
        pytest.param(problem(100, heads=1, kv_heads=1, head_dim=64), 8, 2, 99, id="one head in a group"),
        pytest.param(chunk_of_a_prompt(problem(150, heads=3, kv_heads=1, head_dim=80), 37), 5, 3, 40, id="three, a chunk"),
        pytest.param(
            strided(problem(70, heads=4, kv_heads=1, head_dim=128, causal=False)), 4, 4, 99, id="all keys, strided"
        ),
        pytest.param(problem(70, heads=2, kv_heads=1, causal=False), 4, 2, 30, id="all keys in blocks"),
        pytest.param(masked(problem(130, heads=2, kv_heads=1, batch=2), 90), 3, 2, 40, id="masked keys"),
    ],
)
def test_shares_are_those_of_the_cpu(given, groups, many, most, monkeypatch):
    made, scan = scan_of(given, groups, many, most, monkeypatch)
    sizes, seen, inner, outer = BlockSizes(most), set(), 0, 0
    for tile in range(len(scan.tiles.index)):
        part = slice(tile, tile + 1)
        size, num = sizes.of(scan.tiles, part)
        blocks = blocks_of(given.k.flatten(0, 1), given.v.flatten(0, 1), size, 24)
        known, bar = scan.bars(part, blocks)
        expected, ours = scan.shares(part, blocks, num), made.share[:, part, :, :num]
        # a program writes zeros behind what a list knows, as far as any of its lists knows keys
        hidden = (torch.arange(num) >= known[..., None, None]).expand_as(ours)
        told = known >= alike_scan.NORMAL
        assert_exact(made.bar[:, part][told], bar[told], size=1.0)
        ours = ours.masked_fill(hidden, 0.0)
        assert_same_bits(ours > 0, expected > 0)
        # logarithms: each share to rounding, however small; the scores under it are sums of products this large
        size_of_scores = (scan.query.norm(dim=-1).max() * blocks.keys.norm(dim=-1).max()).item()
        there = expected > 0
        assert_exact(ours[there].log(), expected[there].log(), size=1 + size_of_scores)
        seen.add(size)
        inner, outer = inner + (there & (expected < 1)).sum(), outer + there.sum()
    # most are neither unknown nor as large as a share can be
    assert inner > 0.3 * outer > 0
    assert len(seen) > 1 or not given.causal


def test_shares_are_rounded_by_a_few_steps_of_bfloat16(monkeypatch):
    monkeypatch.setattr(alike_fused, "dtype_of_estimates", lambda device: torch.bfloat16)
    given = problem(100, heads=4, head_dim=64)
    made, scan = scan_of(given, 4, 2, 2**20, monkeypatch)
    # memory for scores of its own dtype
    scan = replace(scan, scores=Scratch(scan.query[:0], 2**16))
    blocks = blocks_of(given.k.flatten(0, 1), given.v.flatten(0, 1), 1, 24)
    # what the kernel is given rounded is rounded here: only squares, of averages as well, and shares remain
    keys, moments = (x[0].float() for x in (made.blocks.keys, made.blocks.moments))
    plain = replace(blocks, keys=keys, squares=keys.square(), moments=moments)
    part = slice(0, len(scan.tiles.index))
    expected, extra = scan.shares(part, plain, 100), scan._allowance(part, plain, 100)
    assert made.share.dtype == torch.bfloat16
    there = expected > 0
    off = (made.share[..., :100].float()[there].log() - expected[there].log()).abs()
    # a step for the share, one for the squares under the root of the allowance, and one for those of averages, of which half
    # the variance of a stretch's scores is made
    half = (scan.query.square().unsqueeze(4) * moments[:, None, None, None, :, 8 * 8 :]).sum(-1).amax()
    assert (off <= torch.finfo(torch.bfloat16).eps * (1 + extra[there].abs() + half)).all()


@pytest.mark.parametrize(
    ("given", "groups", "many", "candidates", "coarse"),
    [
        pytest.param(problem(100, heads=2, kv_heads=1, head_dim=24, causal=False), 4, 2, 21, 2, id="all keys"),
        pytest.param(chunk_of_a_prompt(problem(150, heads=3, kv_heads=1), 68), 5, 3, 40, 1, id="a chunk, three lists"),
        pytest.param(masked(problem(130, kv_heads=1, causal=False, batch=2), 90), 3, 1, 33, 4, id="masked keys, one list"),
    ],
)
def test_candidates_and_their_shares_are_those_of_the_cpu(given, groups, many, candidates, coarse, monkeypatch):
    most = 40
    made, scan = scan_of(given, groups, many, most, monkeypatch, candidates, coarse, groups)
    whole, keys = slice(0, len(scan.tiles.index)), blocks_of(given.k.flatten(0, 1), given.v.flatten(0, 1), 1, 24)
    # the directions by which the kernel groups averages
    ways = made.ordered.directions[:, :, : given.k.shape[3]].transpose(2, 3)
    scan = replace(scan, compared=(made.query @ ways[:, :, None])[..., : scan.compared.shape[-1]])
    sizes, off = BlockSizes(most), 0
    for tile in range(whole.stop):
        part = slice(tile, tile + 1)
        groups_of_all = max(1, min(coarse * many, groups * many // sizes.of(scan.tiles, part)[0]))
        share = scan.of_tiles(part).coarser(groups_of_all).log_shares(part, keys, given.num_keys)[:, 0, 0]
        known = int(scan.bars(part, keys)[0].min())
        found = made.numbers[:, tile].long()
        assert known > candidates
        assert (found.diff(dim=1) > 0).all()
        assert ((found >= 0) & (share.gather(1, found) > -torch.inf)).all()
        # the same keys, but for those whose shares are equal to rounding
        best = share.topk(candidates).values
        assert_exact(share.gather(1, found).sort(1, descending=True)[0], best, size=30.0)
        expected = scan.shares_among(part, keys, found[:, None])[:, 0]
        ours = made.share[:, tile, :, :candidates]
        assert_exact(ours, expected, size=30.0)
        off += ((expected > 0) & (expected < 1)).double().mean() / whole.stop
    # many shares of candidates are as large as a share can be, but not all
    assert off > 0.2


@triton.jit
def _found(share_ptr, numbers_ptr, written_ptr, count, most, BITS: tl.constexpr, DIGIT: tl.constexpr):
    tl.store(written_ptr, find_candidates(share_ptr, numbers_ptr, count, most, BITS, DIGIT, 16, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "most"), [(100, 7), (65, 64), (64, 64), (33, 40), (1, 1), (0, 3)])
def test_the_largest_shares_are_found_without_a_sort(count, most, dtype):
    generator = torch.Generator().manual_seed(count)
    share = torch.rand(count, generator=generator).mul(8).exp().to(dtype)
    # equal ones, none at all, and keys that may be no candidates
    share[::3] = 5.0
    share[1::7], share[2::5] = 0.0, -1.0
    numbers, written = torch.full((most,), -7, dtype=torch.int32), torch.full((1,), -7, dtype=torch.int32)
    _found[(1,)](torch.nn.functional.pad(share, (0, 3), value=100.0), numbers, written, count, most, 8 * dtype.itemsize, 3)
    # of equal shares the first
    order = share.double().sort(descending=True, stable=True)[1]
    expected = order[: min(most, int((share >= 0).sum()))].sort()[0]
    assert written == len(expected)
    assert_same_bits(numbers[: len(expected)].long(), expected)


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
    share_ptr, edges_ptr, noise_ptr, index_ptr, weight_ptr, low_ptr, high_ptr, lists, count, room, num, size,
    MANY: tl.constexpr,
):  # fmt: skip
    """Four lists at a time, few blocks at once."""
    begin = tl.program_id(0) * 4
    draw_lists(
        share_ptr + begin * room, share_ptr, edges_ptr, noise_ptr, index_ptr, weight_ptr, low_ptr, high_ptr, begin,
        tl.minimum(begin + 4, lists), count, room, num, size, 0, 0.2, 1e-30, 5, MANY, 4, 4, 2**30, 57, 64, 32, 64, 0,
    )  # fmt: skip


def drawn(share: Tensor, size: int, edges: Tensor, noise: Tensor, *results: Tensor) -> None:
    lists, room = share.shape
    given = share.contiguous(), edges, noise, *results, lists, int(edges[0, 4]) // size, room, NUM, size
    _draws[(-(-lists // 4),)](*given, POINTS)


@triton.jit
def _draws_among(
    share_ptr, numbers_ptr, edges_ptr, noise_ptr, index_ptr, weight_ptr, low_ptr, high_ptr, counts_ptr, room, most, num,
    MANY: tl.constexpr,
):  # fmt: skip
    """The lists of a tile at a time."""
    tile = tl.program_id(0)
    count = tl.load(counts_ptr + tile)
    draw_lists(
        share_ptr + tile * MANY * room, numbers_ptr + tile * most, edges_ptr, noise_ptr, index_ptr, weight_ptr, low_ptr,
        high_ptr, tile * MANY, (tile + 1) * MANY, count, room, num, 1, 1, 0.2, 1e-30,
        5, MANY, 16, 4, 2**30, 57, 16, 16, 16, 6,
    )  # fmt: skip


def masses(kind: str, blocks: int) -> torch.Tensor:
    share = torch.rand(blocks, generator=torch.Generator().manual_seed(0)).pow(8)
    if kind == "nothing scored":
        return share * 0
    # more than one key takes a draw of its own, one after the other as the law is cut
    return share.index_fill(0, torch.tensor([5, 9]) % blocks, 1.0) if kind == "peaks" else share


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (1, "smooth"), (1, "peaks"), (3, "peaks"), (3, "nothing scored"),
        pytest.param(3, "smooth", marks=pytest.mark.heavy), pytest.param(1, "nothing scored", marks=pytest.mark.heavy),
    ],
)  # fmt: skip
def test_draws_follow_the_law(size, kind):
    """Over evenly spaced offsets every key is listed as often as expected, and its weight is one over that."""
    blocks, tiles = -(-100 // size), len(EDGES)
    left = tuple(torch.tensor(x)[None, :, None] for x in zip(*EDGES.values(), strict=True))
    share = masses(kind, blocks).expand(1, tiles, POINTS, -1)
    # the last blocks are unknown: whatever stands behind the zeros there is not read
    known = torch.full((1, tiles), blocks - 4)
    hidden = torch.arange(blocks) >= blocks - 4
    noise = ((torch.arange(POINTS) + 0.5) / POINTS).double().repeat(tiles)[None]
    given = torch.nn.functional.pad(share.masked_fill(hidden, 0.0), (0, -blocks % 16)).flatten(1, 2)
    given = torch.nn.functional.pad(given, (0, 16), value=torch.nan)
    index, weight = (x.new_empty(1, tiles * POINTS, NUM) for x in (known, torch.empty(0)))
    low, high = (known.new_empty(1, tiles * POINTS) for _ in range(2))
    ends = torch.cat([*left, (known * size)[..., None]], 2)
    drawn(given[0], size, ends[0], noise[0], index[0], weight[0], low[0], high[0])
    assert_same_bits(low, left[0][..., 0].repeat_interleave(POINTS, 1))
    assert_same_bits(high, left[3][..., 0].repeat_interleave(POINTS, 1))
    law = stretches_of(share.masked_fill(hidden, 0.0).contiguous(), size, left, NUM, 0.2, True)
    expected = law.share(torch.arange(100).expand(1, tiles * POINTS, -1)).view(tiles, POINTS, 100)[:, 0] * NUM
    index, weight = index.reshape(tiles, -1), weight.reshape(tiles, -1)
    for tile, (begin, hole_begin, hole_end, end) in enumerate(EDGES.values()):
        key = torch.arange(100)
        left_over = ((key >= begin) & (key < hole_begin)) | ((key >= hole_end) & (key < end))
        full = weight[tile] > -torch.inf
        # empty slots name a key as well
        assert (index[tile] >= 0).all()
        listed = torch.bincount(index[tile][full], minlength=100) / POINTS
        if left_over.sum() <= NUM:
            assert_same_bits(listed, left_over.float())
            assert (weight[tile][full] == 0).all()
            assert full.sum() == POINTS * left_over.sum()
            continue
        assert full.all()
        # a point for each offset may fall on either side of each end of a key
        assert ((listed - expected[tile]).abs() <= 1.01 / POINTS).all()
        assert (listed[~left_over] == 0).all()
        # the law counts in float32, the kernel in fixed point
        assert_exact(weight[tile], -expected[tile][index[tile]].log(), size=10.0)


@pytest.mark.parametrize("most", [1, 12, 17, 60])
@pytest.mark.parametrize("kind", ["smooth", "peaks", "nothing scored"])
def test_draws_among_candidates_follow_the_law(most, kind):
    """Over evenly spaced offsets every key is listed as often as expected, and its weight is one over that."""
    tiles = len(EDGES)
    left = tuple(torch.tensor(x)[None, :, None] for x in zip(*EDGES.values(), strict=True))
    found = candidates_of(torch.rand(1, tiles, 100, generator=torch.Generator().manual_seed(1)), left, most)
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
    _draws_among[(tiles,)](given.flatten(0, 2), numbers, ends, noise, *results, counts, room, most, NUM, POINTS)
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
        pytest.param(
            chunk_of_a_prompt(problem(150), 37), DrawAlike(24, 16, 3, 40, candidates=None), id="a chunk, blocks of keys"
        ),
        pytest.param(masked(problem(100), 75), DrawAlike(24, 32, 4), id="masked keys"),
        pytest.param(
            problem(90, heads=3, kv_heads=1), DrawAlike(24, 24, 5, most=40, candidates=1), id="candidates of odd lists"
        ),
        pytest.param(
            problem(130, kv_heads=1), DrawAlike(16, 32, 4, most=40, candidates=1, coarse=2), id="candidates, many doublings"
        ),
        pytest.param(
            problem(100, heads=2, kv_heads=1, causal=False, batch=2),
            DrawAlike(16, 32, 4, most=30, candidates=2, coarse=2),
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


@pytest.mark.parametrize(("most", "candidates"), [(2**20, None), (40, None), (40, 1)], ids=["keys", "blocks", "candidates"])
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


@pytest.mark.parametrize("candidates", [None, 1])
def test_operators_are_registered_soundly(candidates, monkeypatch):
    method = ha.Method(DrawAlike(24, 32, 4, most=40, candidates=candidates), tile=TILE)
    with Captured() as captured:
        chosen(method, problem(64), fused=True, monkeypatch=monkeypatch)
    assert len(captured.calls) == 5
    for operator, args in captured.calls.items():
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
