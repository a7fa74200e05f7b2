"""Candidates: the law of draws from them and all others; which keys every list of a tile scores; needles."""

from dataclasses import replace

import pytest
import torch

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits
from hyperattention.problem import Problem
from hyperattention.select import DrawAlike
from hyperattention.select.alike import sort_alike
from hyperattention.select.score import pooling
from hyperattention.select.score.alike_scan import AlikeScan
from hyperattention.select.score.block_sizes import BlockSizes
from hyperattention.select.score.candidates import Candidates
from hyperattention.select.score.key_blocks import blocks_of
from hyperattention.select.score.pooling import edges
from hyperattention.select.stage import CoveredKeys
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


def found(count: int, known: int = 30) -> torch.Tensor:
    """The keys of the largest shares that are left and known, ascending, and 30 behind them where they are fewer."""
    hidden = ~torch.stack([there(0), there(1)]) | (torch.arange(30) >= known)
    best = shares()[:, :, 0].masked_fill(hidden, -1.0).topk(count)
    return best.indices.masked_fill(best.values < 0, 30).sort(2)[0]


def law(even: float = 0.25, num: int = 8) -> Candidates:
    among = shares(3).gather(3, found(7)[:, :, None].expand(-1, -1, 3, -1))
    return Candidates.of(among, found(7), LEFT, num, even)


def test_where_fewer_are_left_the_places_behind_them_hold_no_key():
    some = found(20)
    assert some[0, 0].tolist() == [*torch.arange(30)[there(0)].tolist(), *[30] * 6]
    every = Candidates.of(shares(3).gather(3, some[:, :, None].expand(-1, -1, 3, -1).clamp(max=29)), some, LEFT, 8, 0.25)
    index, chance = every.draw(((torch.arange(8) + 0.5) / 8).expand(1, 6, -1))
    assert (index[0, :3, :, None] == torch.arange(30)[there(0)]).any(-1).all()
    assert_exact(every.share(index), chance)


def test_listings_are_those_of_the_formula():
    some, chance = found(7), law().share(torch.arange(30).expand(1, 6, -1))
    for tile in range(2):
        key, left = torch.arange(30), there(tile)
        candidate = (key[:, None] == some[0, tile]).any(1)
        for one in range(3):
            mass = shares(3)[0, tile, one] * candidate
            for _ in range(4):
                mass = mass.clamp(max=mass.sum().item() / (0.75 * 8))
            mass = (mass / mass.sum() * 0.75 * 8 + left * 0.25 * 8 / left.sum()).clamp(max=1)
            assert_exact(chance[0, 3 * tile + one].float(), (mass / mass.sum()).float())


def test_every_key_that_is_left_has_a_weight_of_one_on_average():
    num, offsets = 8, 4000
    some = found(7)
    # lists that differ by where inside a slot their points lie
    same = shares().gather(3, some[:, :, None]).expand(-1, -1, offsets, -1).clone()
    noise = ((torch.arange(offsets, dtype=torch.float64) + 0.5) / offsets).repeat(2)[None, :, None]
    index, chance = Candidates.of(same, some, LEFT, num, 0.25).draw((torch.arange(num) + noise) / num)
    weight = torch.zeros(2 * offsets, 30, dtype=torch.float64).scatter_add(1, index[0], 1 / (chance[0] * num))
    for tile, mean in enumerate(weight.unflatten(0, (2, offsets)).mean(1)):
        assert (mean[there(tile)] - 1).abs().max() < 0.02
        assert (mean[~there(tile)] == 0).all()


def test_keys_that_no_query_knows_are_among_the_others():
    # fewer keys are known than may be candidates, and more are left than are known
    some = found(16, known=12)
    assert (some == 30).any()
    same = shares().gather(3, some[:, :, None].clamp(max=29)).expand(-1, -1, 500, -1).clone()
    same.masked_fill_((some == 30)[:, :, None], 0.0)
    noise = ((torch.arange(500, dtype=torch.float64) + 0.5) / 500).repeat(2)[None, :, None]
    index, chance = Candidates.of(same, some, LEFT, 8, 0.25).draw((torch.arange(8) + noise) / 8)
    weight = torch.zeros(1000, 30, dtype=torch.float64).scatter_add(1, index[0], 1 / (chance[0] * 8))
    for tile, mean in enumerate(weight.unflatten(0, (2, 500)).mean(1)):
        assert (mean[there(tile)] - 1).abs().max() < 0.05
        assert (mean[~there(tile)] == 0).all()


def test_each_of_a_million_other_keys_can_be_drawn():
    keys, num, offsets = 2**20, 640, 4096
    left = tuple(torch.tensor([[[x]]]) for x in (0, keys, keys, keys))
    some = torch.arange(0, keys, keys // 1024)[None, None]
    share = torch.full((1, 1, offsets, 1024), 1e-3)
    # a slot of the others has 16,384 keys: points lie a quarter of a key apart
    noise = ((torch.arange(offsets, dtype=torch.float64) + 0.5) / 2**16)[None, :, None]
    index, chance = Candidates.of(share, some, left, num, 0.1).draw((torch.arange(num) + noise) / num)
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


def scan_of(given: Problem, sizes: tuple[int, ...], groups: int = 4) -> tuple:
    """Averages of all tiles, blocks of keys, and what is left of them: all that queries see."""
    tiles = cut(given, TILE)
    _, query, few = sort_alike(tiles, 4)
    blocks = blocks_of(given.k.flatten(0, 1), given.v.flatten(0, 1), sizes, 24)
    return AlikeScan.of(tiles, query, few, groups), blocks, edges(tiles, CoveredKeys())


@pytest.mark.parametrize("keys", [320, 333])
@pytest.mark.parametrize("size", [4, 16, 64])
def test_where_all_blocks_are_opened_shares_are_those_of_all_keys(size, keys):
    """However often blocks are opened; with what stands behind the last whole block."""
    scan, blocks, left = scan_of(problem(keys, causal=False, heads=4, kv_heads=2), (1, 4, 16, 64))
    part = slice(2, 6)
    some = tuple(x[:, part] for x in left)
    (index, share), (every, expected) = (scan.shares(part, blocks, some, each, 1000) for each in (size, 1))
    assert every[0, 0].tolist() == list(range(keys))
    assert (index[..., keys:] == keys).all()
    assert_same_bits(index[..., :keys], every)
    assert_exact(share[..., :keys], expected)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_tiles_find_together_what_each_finds_alone(size):
    """Queries of masked tiles know fewer keys than their positions bound, and no whole number of blocks."""
    given = problem(333, causal=True, heads=4, kv_heads=2)
    shown = torch.rand(1, 333, generator=torch.Generator().manual_seed(0)) < 0.8
    scan, blocks, left = scan_of(replace(given, rank=shown.cumsum(1)), (1, 4, 16))

    def found(part: slice) -> tuple[torch.Tensor, ...]:
        return scan.shares(part, blocks, tuple(x[:, part] for x in left), size, 60)

    known, together = scan.tiles.by_list(scan.tiles.known)[:, 2:9], found(slice(2, 9))
    for at in range(7):
        alone = found(slice(2 + at, 3 + at))
        # places behind the keys that a tile may see by its position hold none
        assert (together[0][:, at, alone[0].shape[2] :] == 333).all()
        assert_same_bits(together[0][:, at, : alone[0].shape[2]], alone[0][:, 0])
        assert_same_bits(together[1][:, at, :, : alone[1].shape[3]], alone[1][:, 0])
        key = alone[0][alone[0] < 333].view(2, -1)
        assert (key < known[:, at, None]).all()
        assert key.shape[1] == (int(known[0, at]) if size == 1 else min(60 + int(known[0, at]) % 4, int(known[0, at])))


def test_shares_of_all_keys_are_those_of_the_formula():
    given = problem(200, causal=True, heads=4, kv_heads=2)
    scan, blocks, left = scan_of(given, (1,), 5)
    index, share = scan.shares(slice(5, 6), blocks, tuple(x[:, 5:6] for x in left), 1, 10)
    assert index[0, 0].tolist() == list(range(160))
    k, v = (x[0].double() for x in (given.k, given.v))
    centred, far = k - k[:, :24].mean(1, keepdim=True), (v - v[:, :24].mean(1, keepdim=True)).norm(dim=2)
    log_value = (far / far[:, :24].mean(1, keepdim=True)).log().clamp(-2, 2)[:, None, :160]
    query, apart = scan.query[:, 5].double(), scan.spread[:, 5, :, :8].double()
    score = query @ centred[:, None, :160].transpose(2, 3)  # [lists, many, groups, keys]
    log = score.log_softmax(3) + scan.log_rows[:, 5, ..., None]
    deviation = (apart @ centred[:, :160].square().transpose(1, 2)).sqrt()
    assert_exact(share[:, 0], (log.amax(2) + 2 * deviation + log_value).clamp(max=0).exp().float())


def test_blocks_of_the_largest_shares_are_opened():
    """Keys of few blocks are alone looked for: these are found, at 24 of 1,008 keys."""
    given = problem(1024, causal=True, heads=2, kv_heads=2)
    way = torch.nn.functional.normalize(torch.ones(8), dim=0)
    given.k.mul_(0.3).sub_((given.k @ way)[..., None] * way)
    wanted = torch.tensor([100, 301, 502, 703, 900])
    given.k[:, :, wanted], given.q[:, :, 1000:] = 6 * way, 3 * way + 0.1 * given.q[:, :, 1000:]
    sizes = BlockSizes(70).all(cut(given, TILE))
    assert sizes == (1, 4, 16)
    scan, blocks, left = scan_of(given, sizes)
    index, share = scan.shares(slice(31, 32), blocks, tuple(x[:, 31:] for x in left), 16, 24)
    assert (index < 1024).sum(2).max() == 24
    for one in range(2):
        assert torch.isin(wanted, index[one, 0]).all()
        found = torch.isin(index[one, 0], wanted)
        assert (share[one, 0, :, found].amax(0) > 0.05).all()
        # what nothing looks for has next to none of the sum
        assert share[one, 0, :, ~found].mean() < 0.005


def test_keys_that_earlier_stages_took_are_no_candidates():
    given = problem(600, causal=True, heads=4, kv_heads=2)
    scan, blocks, _ = scan_of(given, (1, 4, 16))
    # sinks, a window, and a hole, all of them inside blocks
    part, edge = slice(17, 18), (7, 101, 122, 530)
    left = tuple(torch.full((2, 1, 1), x) for x in edge)
    for size in (1, 4, 16):
        index, share = scan.shares(part, blocks, left, size, 200)
        key, share = index[index < 600], share.amax(2)[index < 600]
        taken = (key < 7) | ((key >= 101) & (key < 122)) | (key >= 530)
        assert (share[taken] == 0).all()
        assert (share[~taken] > 0).sum() > 200
        # no block is opened of which nothing is left
        assert size == 1 or taken.sum() < 40


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


def test_chunks_change_no_list(monkeypatch):
    given = problem(600, causal=True, heads=4, kv_heads=2)
    method = ha.Method(ha.Window(16), DrawAlike(24, rows=16, pooled=4, most=100, candidates=2), tile=TILE)
    whole = dense.weights(method, given)
    monkeypatch.setattr(pooling, "SCORE_BYTES", 2**17)
    assert_exact(dense.weights(method, given), whole)


def test_products_are_counted_and_bounded():
    stage = DrawAlike(640, rows=64, pooled=16)

    def pairs(keys: int) -> float:
        return stage.selection_pairs(keys, 256, 64, True)

    # for each list of 64 queries sixteen averages and a product for deviations; for a tile, one more with each block
    key, block = 17 / 64, 17 / 64 + 1 / 256
    assert pairs(8192) == pytest.approx(4096 * key)
    # from there on blocks of four, of which two thousand to eight thousand are seen, and keys
    once = 20_480 / 4 * block + 7680 * key
    assert pairs(32_768) == pytest.approx(4096 / 4 * key + once * 3 / 4)
    # blocks of sixteen, and twice as many of four as keys at last
    twice = (81_920 / 16 + 2 * 7680) * block + 7680 * key
    assert pairs(131_072) == pytest.approx(4096 / 16 * key + once * 3 / 16 + twice * 3 / 4)
    # what a tile scores is bounded up to one more size of blocks
    assert pairs(2**20) < (8192 + 3 * 2 * 7680) * block + 7680 * key
    assert pairs(2**23) < 1.6 * pairs(2**20)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="candidates=0"):
        DrawAlike(16, candidates=0)
    with pytest.raises(ValueError, match="most=0"):
        DrawAlike(16, most=0)
