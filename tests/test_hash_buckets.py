"""Hash buckets: the order of the codes, who shares a bucket, and that no pair counts twice."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_unbiased
from front_door import with_lse
from hyperattention.select.locate.hash_buckets import HashBuckets, gray_rank
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage
from hyperattention.tiling import Tiles
from pair_weights import pair_weights, replicas

BITS = 7


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Forgetful(Stage):
    """A planted violation: buckets whose pairs later stages are not told of."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def select_apart(self, tiles: Tiles, taken: CoveredKeys):
        return self.stage.select_apart(tiles, taken)[0], taken

    def select(self, tiles: Tiles, taken: CoveredKeys):
        return (), taken

    def slots(self, tile: int) -> int:
        return self.stage.slots(tile)


def differing_bits(order: Tensor) -> list[int]:
    return [(int(a) ^ int(b)).bit_count() for a, b in pairwise(order)]


def test_neighbours_in_rank_differ_in_one_bit() -> None:
    code = torch.arange(2**BITS)
    assert set(differing_bits(gray_rank(code, BITS).argsort())) == {1}
    assert gray_rank(code, BITS).sort()[0].equal(code)
    # the published order, by Gray(code), breaks this law
    assert max(differing_bits((code ^ (code >> 1)).argsort())) > 1


@pytest.mark.parametrize("bits", [1, 2, 5, 62])
def test_ranks_invert_the_gray_code_for_any_number_of_bits(bits: int) -> None:
    rank = torch.tensor([0, 1, 2, 3, 2**bits - 1, 2**bits // 3]) % 2**bits
    assert gray_rank(rank ^ (rank >> 1), bits).equal(rank)


@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (20, 53), (53, 20), (3, 40), (40, 1)])
def test_buckets_are_equal_to_one_and_hold_every_key_once(queries: int, keys: int) -> None:
    weight = pair_weights(ha.Method(HashBuckets(8)), tokens(1, 2, queries, 4), tokens(1, 1, keys, 4, seed=1))
    assert_exact(weight, weight.round())
    buckets = -(-keys // 8)
    assert set(weight.sum(-1).round().flatten().tolist()) <= {keys // buckets, -(-keys // buckets)}
    if queries >= buckets:
        distinct = weight[0, 0].round().unique(dim=0)
        assert len(distinct) == buckets
        assert_exact(distinct.sum(0), torch.ones(keys, dtype=torch.float64))


def test_what_points_the_same_way_shares_a_bucket_wherever_the_cones_lie() -> None:
    x = tokens(1, 3, 41, 4)
    weight = pair_weights(ha.Method(HashBuckets(8)), x, x)
    assert_exact(weight.diagonal(dim1=2, dim2=3), torch.ones(1, 3, 41, dtype=torch.float64))
    # two narrow cones: without centring every token would have the code of its cone
    shifted = pair_weights(ha.Method(HashBuckets(8)), x + tokens(4, seed=2), x + tokens(4, seed=3))
    assert_exact(shifted.round(), weight.round())


def test_dead_keys_neither_shift_the_buckets_nor_are_seen() -> None:
    q, k, live = tokens(2, 1, 21, 4), tokens(2, 1, 30, 4, seed=1), torch.rand(2, 30, generator=torch.manual_seed(0)) < 0.6
    weight = pair_weights(ha.Method(HashBuckets(4)), q, k, key_mask=live)
    # every live key is in some query's bucket, and no dead one is
    assert torch.equal(weight.amax(2)[:, 0] > 0.5, live)
    changed = torch.where(live[:, None, :, None], k, 1e3 * tokens(2, 1, 30, 4, seed=5))
    options = {"method": ha.Method(HashBuckets(4)), "key_mask": live}
    assert_same_bits(ha.attention(q, k, k, **options), ha.attention(q, changed, changed, **options))


STAGES = {
    "draws": (HashBuckets(8), ha.Draw(8)),
    "window before": (ha.Sinks(3), ha.Window(6), HashBuckets(8), ha.Draw(8)),
    "window after": (HashBuckets(8), ha.Sinks(3), ha.Window(6), ha.Draw(8)),
    "blocks after": (ha.Window(6), HashBuckets(8), ha.TopBlocks(2, block_size=4), ha.Draw(8)),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_partition_of_unity(name: str, causal: bool) -> None:
    q, k = replicas(tokens(1, 2, 33, 4), tokens(1, 1, 39, 4, seed=1), 300)
    live = torch.arange(39)[None] != 5
    method = ha.Method(*STAGES[name], tile=5)
    weight = pair_weights(method, q, k, key_mask=live, is_causal=causal, causal_align="lower_right")
    seen = dense.visible(33, 39, causal=causal, align="lower_right") & live
    assert method.complete
    assert_unbiased(weight[0, ::2], seen.double(), largest_error=0.2, rounding=1e-9)
    assert_unbiased(weight[0, 1::2], seen.double(), largest_error=0.2, rounding=1e-9)


def test_the_partition_test_catches_pairs_that_count_twice() -> None:
    q, k = replicas(*[tokens(1, 1, 33, 4)] * 2, 300)
    truth = torch.ones(33, 33, dtype=torch.float64)
    honest = pair_weights(ha.Method(HashBuckets(8), ha.Draw(8), tile=5), q, k)
    assert_unbiased(honest[0], truth, largest_error=0.2, rounding=1e-9)
    double = pair_weights(ha.Method(Forgetful(HashBuckets(8)), ha.Draw(8), tile=5), q, k)
    with pytest.raises(AssertionError, match="standard errors from the truth"):
        assert_unbiased(double[0], truth, largest_error=0.2, rounding=1e-9)


def test_every_certain_pick_is_taken_once() -> None:
    q, k = tokens(1, 2, 40, 4), tokens(1, 1, 40, 4, seed=1)
    for stages in ((ha.Sinks(3), ha.Window(6), HashBuckets(8)), (HashBuckets(8), ha.Window(6), ha.Sinks(3))):
        weight = pair_weights(ha.Method(*stages, tile=5), q, k, is_causal=True)
        assert_exact(weight, (weight > 0.5).double())
    assert not ha.Method(HashBuckets(8)).complete


def test_gradient_is_that_of_the_selection_held_fixed() -> None:
    q, k, v = (tokens(1, h, 23, 4, seed=h).requires_grad_() for h in (4, 2, 1))
    v = torch.diag(torch.arange(1.0, 24, dtype=torch.float64)).expand(1, 2, -1, -1).clone().requires_grad_()
    method = ha.Method(ha.Window(4), HashBuckets(6), ha.Draw(5), tile=5)
    weight = pair_weights(method, q.detach(), k.detach(), v.detach()[0, 0].diagonal(), is_causal=True)
    weight = torch.where(weight < 1e-9, 0.0, weight)
    ours = with_lse(q, k, v, method=method, is_causal=True, enable_gqa=True)
    theirs = dense.attention(q, k, v, causal=True, weight=weight)
    mix = tokens(1, 4, 23, 23, seed=9)
    grads = [torch.autograd.grad((out * mix).sum() + lse.sin().sum(), (q, k, v)) for out, lse in (ours, theirs)]
    for mine, expected in zip(*grads, strict=True):
        assert_exact(mine, expected)


def test_one_seed_one_result_and_heads_hash_apart() -> None:
    q, k = tokens(1, 1, 40, 4).repeat(1, 2, 1, 1), tokens(1, 1, 40, 4, seed=1).repeat(1, 2, 1, 1)
    first, again, other = (pair_weights(ha.Method(HashBuckets(8)), q, k, seed=seed) for seed in (0, 0, 1))
    assert_same_bits(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])
    joined = pair_weights(ha.Method(HashBuckets(8)), *(torch.cat((x, 2 * x.flip(2))) for x in (q, k)))
    assert_exact(joined[:1], first)


def test_values_that_are_not_finite_never_break_the_selection() -> None:
    q, k = tokens(1, 1, 20, 4), tokens(1, 1, 20, 4, seed=1)
    k[0, 0, 3], q[0, 0, 4] = torch.nan, torch.inf
    assert ha.attention(q, k, k, method=ha.Method(HashBuckets(4), ha.Draw(4))).shape == q.shape


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (1, 1)])
def test_few_tokens(queries: int, keys: int) -> None:
    q, k = tokens(1, 2, queries, 4), tokens(1, 1, keys, 4)
    method = ha.Method(HashBuckets(4), ha.Draw(4))
    out, lse = with_lse(q, k, k, method=method, enable_gqa=True)
    expected = with_lse(q, k, k, method=ha.Exact(), enable_gqa=True)
    assert_exact(out, expected[0])
    assert_exact(lse, expected[1])


def test_order_of_stages() -> None:
    for earlier in (ha.Draw(4), ha.TopBlocks(2), HashBuckets(4)):
        with pytest.raises(ValueError, match="cannot follow.*count twice"):
            ha.Method(earlier, HashBuckets(8))
    ha.Method(ha.Sinks(1), ha.Window(4), HashBuckets(8), ha.TopBlocks(2), ha.Draw(4))


def test_declarations_and_bad_sizes() -> None:
    method = ha.Method(HashBuckets(32, bits=5), ha.Draw(16))
    assert method.looks_ahead is LookAhead.SEQUENCE
    cost = method.cost(10_000)
    assert (cost.pairs, cost.selection_pairs) == (48, 10)
    assert repr(HashBuckets(32)) == "HashBuckets(bucket_size=32, bits=7)"
    for bad in ({"bucket_size": 0}, {"bucket_size": 4, "bits": 0}, {"bucket_size": 4, "bits": 63}):
        with pytest.raises(ValueError, match="HashBuckets"):
            HashBuckets(**bad)
