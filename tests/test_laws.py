"""What holds for every method, whatever it chooses: the laws, over each line of cases.py."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_same_math, assert_unbiased
from cases import CASES, Case
from hyperattention.method import Method
from hyperattention.problem import Problem
from pair_weights import pair_weights
from problems import problem, tensors

pytestmark = [pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)]
both_masks = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])

# draws of the test of expectations: a number fixed beforehand, whatever the first ones show
HEADS, SEEDS, FEW_SEEDS = 8, 8, 3
# tokens beyond which few do, for every draw is made by many tiles; weights measured through attention are slow as well
LONG = 1000
# of weights whose logarithms are float32
ROUNDING = 1e-5
# of methods that are no list of stages: rows and keys of a tile of their own
TILE = 16


def lists_of(case: Case) -> Method:
    if not isinstance(case.method, Method):
        pytest.skip("it is no list of stages: there is no selection to look at")
    return case.method


def nothing_ahead(case: Case) -> None:
    if case.method.looks_ahead == ha.LookAhead.SEQUENCE:
        pytest.skip("it declares that it looks at the whole sequence")


def weights_of(case: Case, asked: Problem) -> Tensor:
    """Weights of every head, ``[heads, queries, keys]``, from the lists where there are any."""
    if isinstance(case.method, Method):
        return dense.weights(case.method, asked)[0]
    return pair_weights(case.method, asked.q.double(), asked.k.double(), is_causal=asked.causal, seed=asked.seed)[0]


def run(case: Case, q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    options = {"is_causal": True, "enable_gqa": True, "method": case.method} | options
    return ha.attention(q, k, v, return_lse=True, **options)


def assert_all_same_bits(ours: tuple[Tensor, ...] | list[Tensor], expected: tuple[Tensor, ...] | list[Tensor]) -> None:
    for x, y in zip(ours, expected, strict=True):
        assert_same_bits(x, y)


def tile_of(case: Case) -> int:
    return case.method.tile if isinstance(case.method, Method) else TILE


def unharmed(case: Case, last: int) -> int:
    """Rows that may not change when tokens after `last` do."""
    return last + 1 if case.method.looks_ahead == ha.LookAhead.NOTHING else (last + 1) // tile_of(case) * tile_of(case)


def edges(case: Case) -> list[int]:
    """The last row of a tile, the first of the next, and a row inside one; near the middle and near the end."""
    tile, middle = tile_of(case), case.num_tokens // 2 // tile_of(case) * tile_of(case)
    return [middle - 1, middle, middle + tile // 2, case.num_tokens - 2]


# the cover: who is listed, and how often


@both_masks
def test_weights_are_a_partition_of_unity_or_the_method_says_not(case, causal):
    n = case.num_tokens
    asked = problem(n, causal=causal, heads=1, kv_heads=1)
    # heads of equal tokens, each of which draws for itself, under several seeds
    q, k, v = (x.expand(-1, HEADS, -1, -1) for x in (asked.q, asked.k, asked.v))
    seen = dense.visible(n, n, causal=causal).double()
    # sums over sixteen stretches of keys, over every sixteenth key, and in directions where errors cannot cancel
    place = torch.arange(n)
    bins = torch.cat([place * 16 // n == torch.arange(16)[:, None], place % 16 == torch.arange(16)[:, None]]).double()
    signs = torch.randn(8, n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    statistics, total = [], torch.zeros_like(seen)
    few = n > LONG or not isinstance(case.method, Method)
    for seed in range(FEW_SEEDS if few else SEEDS):
        weight = weights_of(case, replace(asked, q=q, k=k, v=v, seed=seed))
        total += weight.sum(0)
        excess = weight - seen
        in_bins = excess.sum(1) @ bins.T / (bins @ seen.sum(0))
        in_directions = excess.flatten(1) @ signs.flatten(1).T / n**2
        statistics.append(torch.cat([in_bins, in_directions, excess.mean((1, 2))[:, None]], 1))
    assert (total * (1 - seen)).abs().max() <= ROUNDING, "a key counts for a query that cannot see it"
    if case.method.complete:
        assert_unbiased(torch.cat(statistics), 0.0, largest_error=0.1, rounding=ROUNDING)
    else:
        assert total.max() <= HEADS * len(statistics), "an incomplete method lists a key more than once"
        assert (total[seen == 1] == 0).any(), "it lists every key: let it declare itself complete"


@both_masks
def test_indices_are_in_range_and_blocks_ascend(case, causal):
    method = lists_of(case)
    tiles, selection = method.select(problem(case.num_tokens, causal=causal))
    assert len(tiles.index) == -(-case.num_tokens // tiles.size)
    for _, selection in method.selections(problem(case.num_tokens, causal=causal)):
        assert selection.row_limit.max() <= case.num_tokens
        assert torch.equal(selection.key_row, torch.arange(2))
        for slots in selection.runs:
            index, live = dense.listed(slots)
            assert not (live & ((index < 0) | (index >= case.num_tokens))).any()
    for slots in method.select(problem(case.num_tokens, causal=causal))[1].runs:
        if slots.size == 1:  # draws of several densities stand one after another
            continue
        first = slots.first.masked_fill(slots.log_weight == -torch.inf, -case.num_tokens)
        assert ((first == first.cummax(2)[0]) | (first == -case.num_tokens)).all()


@both_masks
def test_a_budget_of_all_keys_is_exact(case, causal):
    q, k, v = tensors(case.exact_up_to, heads=4)
    ours = run(case, q, k, v, is_causal=causal)
    truth, plain = (f(q, k, v, causal=causal) for f in (dense.reference, dense.attention))
    for x, y, z in zip(ours, truth, plain, strict=True):
        assert_same_math(x, y, z)


@both_masks
def test_the_kernel_attends_as_the_lists_say(case, causal):
    method, asked = lists_of(case), problem(case.num_tokens, causal=causal, heads=4)
    q, k, v = asked.q, asked.k, asked.v
    options = {"causal": causal, "weight": dense.weights(method, asked)}
    ours = run(case, q, k, v, is_causal=causal)
    truth, plain = (f(q, k, v, **options) for f in (dense.reference, dense.attention))
    for x, y, z in zip(ours, truth, plain, strict=True):
        assert_same_math(x, y, z)


@both_masks
def test_every_key_twice_adds_log_2(case, causal):
    q, k, v = tensors(case.exact_up_to // 2)
    truth = dense.attention(q, k, v, causal=causal)
    q, k, v = (x.repeat_interleave(2, 2) for x in (q, k, v))
    # the second of each pair of tokens sees every earlier token, and its own, twice
    out, lse = (x[:, :, 1::2] for x in run(case, q, k, v, is_causal=causal))
    assert_exact(out, truth[0])
    assert_exact(lse, truth[1] + torch.tensor(2.0).log())


# randomness


@both_masks
def test_the_seed_decides_every_bit_and_nothing_else_does(case, causal):
    q, k, v = tensors(case.num_tokens)
    state = torch.get_rng_state()
    first = run(case, q, k, v, is_causal=causal, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1234)
    assert_all_same_bits(run(case, q, k, v, is_causal=causal, seed=3), first)
    draws = case.method.complete and not isinstance(case.method, ha.Exact)
    for other in ({"seed": 4}, {"seed": 3, "layer": 1}, {"seed": 3 + 2**62}):
        same = torch.equal(run(case, q, k, v, is_causal=causal, **other)[0], first[0])
        assert same != draws, f"{other} must change the draws, and nothing where there are none"


def test_draws_do_not_depend_on_the_length(case):
    nothing_ahead(case)
    method = lists_of(case)
    # whole tiles: a tile that the sequence ends in has fewer keys to draw from
    n = case.num_tokens // method.tile * method.tile
    long = problem(n + n // 2)
    short = replace(long, q=long.q[:, :, :n], k=long.k[:, :, :n], v=long.v[:, :, :n])
    assert_same_bits(dense.weights(method, long)[:, :, :n, :n], dense.weights(method, short))


# who may depend on whom


@both_masks
def test_batch_rows_and_heads_are_independent(case, causal):
    q, k, v = tensors(case.num_tokens, batch=2, heads=4)
    before = run(case, q, k, v, is_causal=causal)
    other = [torch.cat([x[:1], -x[1:].flip(2)]) for x in (q, k, v)]
    after = run(case, *other, is_causal=causal)
    assert_all_same_bits([x[0] for x in after], [x[0] for x in before])
    assert not torch.equal(after[0][1], before[0][1])
    # the first kv head, and with it the first half of the query heads, is left alone
    other = [torch.cat([x[:, : x.shape[1] // 2], -x[:, x.shape[1] // 2 :]], 1) for x in (q, k, v)]
    after = run(case, *other, is_causal=causal)
    assert_all_same_bits([x[:, :2] for x in after], [x[:, :2] for x in before])
    assert not torch.equal(after[0][:, 2:], before[0][:, 2:])


@both_masks
def test_a_group_of_equal_heads_is_one_head(case, causal):
    q, k, v = tensors(case.num_tokens)
    alone = run(case, q, k, v, is_causal=causal)
    grouped = run(case, q.repeat_interleave(3, 1), k, v, is_causal=causal)
    for x, y in zip(grouped, alone, strict=True):
        assert_exact(x, y.repeat_interleave(3, 1))


@pytest.mark.parametrize("padding", [0, 10])
def test_later_tokens_change_no_earlier_row(case, padding):
    nothing_ahead(case)
    q, k, v = tensors(case.num_tokens)
    # padding on the left: tiles of positions and blocks of live keys no longer share their edges
    options = {"key_mask": torch.arange(case.num_tokens)[None] >= padding} if padding else {}
    before = run(case, q, k, v, **options)
    for last in edges(case):
        other = [torch.cat([x[:, :, : last + 1], -x[:, :, last + 1 :].flip(2)], 2) for x in (q, k, v)]
        after = run(case, *other, **options)
        rows = unharmed(case, last)
        assert_all_same_bits([x[:, :, :rows] for x in after], [x[:, :, :rows] for x in before])
        assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_no_earlier_tile_reads_what_is_not_finite(case, poison):
    nothing_ahead(case)
    lists_of(case)
    q, k, v = tensors(case.num_tokens)
    before = run(case, q, k, v)
    last = case.num_tokens - 3
    after = run(case, *(x.index_fill(2, torch.arange(last + 1, case.num_tokens), poison) for x in (q, k, v)))
    # within its own tile 0 times infinity may be formed, as in torch's own masked softmax
    rows = (last + 1) // tile_of(case) * tile_of(case)
    assert_all_same_bits([x[:, :, :rows] for x in after], [x[:, :, :rows] for x in before])


def test_a_prompt_cut_at_tile_edges_equals_one_shot(case):
    nothing_ahead(case)
    q, k, v = tensors(case.num_tokens, heads=4)
    tile, n = tile_of(case), case.num_tokens
    cuts = [0, tile, 3 * tile, n // tile * tile, n]
    chunks = [
        run(case, q[:, :, a:b], k[:, :, :b], v[:, :, :b], causal_align="lower_right") for a, b in itertools.pairwise(cuts)
    ]
    for ours, expected in zip(zip(*chunks, strict=True), run(case, q, k, v), strict=True):
        assert_exact(torch.cat(ours, 2), expected)


@both_masks
def test_masked_keys_have_no_influence(case, causal):
    q, k, v = tensors(case.num_tokens, batch=2)
    live = torch.ones(2, case.num_tokens, dtype=torch.bool)
    live[0, -30:], live[1, :21], live[1, 40:45] = False, False, False
    before = run(case, q, k, v, is_causal=causal, key_mask=live)
    for poison in (100.0, torch.nan):
        other = [x.masked_fill(~live[:, None, :, None], poison) for x in (k, v)]
        assert_all_same_bits(run(case, q, *other, is_causal=causal, key_mask=live), before)


def test_padding_on_the_right_changes_nothing(case):
    nothing_ahead(case)
    n = case.num_tokens
    q, k, v = tensors(n + 20)
    alone = run(case, q[:, :, :n], k[:, :, :n], v[:, :, :n])
    padded = run(case, q, k, v, key_mask=torch.arange(n + 20)[None] < n)
    rows = unharmed(case, n - 1)
    for x, y in zip(padded, alone, strict=True):
        assert_exact(x[:, :, :rows], y[:, :, :rows])


# the smallest sizes


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 0), (0, 5), (5, 0), (1, 1), (40, 1), (1, 40)])
def test_few_tokens_or_none(case, num_queries, num_keys):
    q, k, v = tensors(num_queries, num_keys, heads=4, value_dim=3)
    for causal, align in ((False, "upper_left"), (True, "upper_left"), (True, "lower_right")):
        ours = run(case, q, k, v, is_causal=causal, causal_align=align)
        truth, plain = (f(q, k, v, causal=causal, align=align) for f in (dense.reference, dense.attention))
        for x, y, z in zip(ours, truth, plain, strict=True):
            assert x.shape == y.shape
            if num_keys <= case.exact_up_to:
                assert_same_math(x, y, z)


def test_an_empty_batch(case):
    q, k, v = tensors(20, batch=0)
    out, lse = run(case, q, k, v)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
