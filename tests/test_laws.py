"""What holds for every method, whatever it chooses: the laws, over each line of cases.py."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_same_math, assert_unbiased
from cases import CASES, Case
from hyperattention.method import Method
from problems import problem, tensors

pytestmark = [pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)]
both_masks = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])

# draws of the tests of expectations: fixed, whatever the first ones show
NUM_SEEDS = 100


def lists_of(case: Case) -> Method:
    if not isinstance(case.method, Method):
        pytest.skip("it is no list of stages: there is no selection to look at")
    return case.method


def run(case: Case, q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    options = {"is_causal": True, "enable_gqa": True, "method": case.method} | options
    return ha.attention(q, k, v, return_lse=True, **options)


def assert_all_same_bits(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(ours, expected, strict=True):
        assert_same_bits(x, y)


def tile_of(case: Case) -> int:
    return case.method.tile if isinstance(case.method, Method) else 16


def edges(case: Case) -> list[int]:
    """The last row of a tile, the first of the next, and a row inside one; near the middle and near the end."""
    tile, middle = tile_of(case), case.num_tokens // 2 // tile_of(case) * tile_of(case)
    return [middle - 1, middle, middle + tile // 2, case.num_tokens - 2]


# the cover: who is listed, and how often


@both_masks
def test_weights_are_a_partition_of_unity_or_the_method_says_not(case, causal):
    method, asked = lists_of(case), problem(case.num_tokens, causal=causal, heads=1, kv_heads=1)
    seen = dense.visible(case.num_tokens, case.num_tokens, causal=causal).double()
    signs = torch.randn(8, *seen.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    statistics = []
    total = torch.zeros_like(seen)
    for seed in range(NUM_SEEDS):
        weight = dense.weights(method, replace(asked, seed=seed))[0]
        total += weight
        excess = weight - seen
        # every key's mean over rows, the mean of all, and directions in which errors of opposite sign cannot cancel
        rest = torch.stack([excess.mean(), *(excess * signs).mean((1, 2))])
        statistics.append(torch.cat([excess.sum(0) / seen.sum(0), rest]))
    assert not (total[seen == 0] > 0).any(), "a key is listed for a query that cannot see it"
    if method.complete:
        # rounding: log-weights are float32
        assert_unbiased(torch.stack(statistics), 0.0, largest_error=0.2, rounding=1e-5)
    else:
        assert total.max() <= NUM_SEEDS, "an incomplete method lists a key more than once"
        assert (total[seen == 1] == 0).any(), "it lists every key: let it declare itself complete"


@both_masks
def test_indices_are_sorted_and_in_range(case, causal):
    tiles, selection = lists_of(case).select(problem(case.num_tokens, causal=causal))
    assert selection.row_limit.amax() <= case.num_tokens
    assert torch.equal(selection.key_row, torch.arange(2))
    for slots in selection.runs:
        index, live = dense.listed(slots)
        assert not (live & ((index < 0) | (index >= case.num_tokens))).any()
        first = slots.first.masked_fill(slots.log_weight == -torch.inf, case.num_tokens)
        assert (first.diff(dim=2) >= 0).all() or slots.first.shape[2] == 1
    assert len(tiles.index) == -(-case.num_tokens // tiles.size)


@both_masks
def test_a_budget_of_all_keys_is_exact(case, causal):
    q, k, v = tensors(case.exact_up_to, heads=4)
    ours = run(case, q, k, v, is_causal=causal)
    for x, truth, plain in zip(ours, dense.reference(q, k, v, causal=causal), dense.attention(q, k, v, causal=causal), strict=True):
        assert_same_math(x, truth, plain)


@both_masks
def test_the_kernel_attends_as_the_lists_say(case, causal):
    method, asked = lists_of(case), problem(case.num_tokens, causal=causal, heads=4)
    weight = dense.weights(method, asked).repeat_interleave(2, 0)[None]
    q, k, v = asked.q, asked.k, asked.v
    ours = run(case, q, k, v, is_causal=causal)
    truth = dense.reference(q, k, v, causal=causal, weight=weight)
    plain = dense.attention(q, k, v, causal=causal, weight=weight)
    for x, y, z in zip(ours, truth, plain, strict=True):
        assert_same_math(x, y, z)


@both_masks
def test_every_key_twice_adds_log_2(case, causal):
    q, k, v = tensors(case.exact_up_to // 2)
    truth = dense.reference(q, k, v)
    if causal:
        # every token twice: the second of each pair sees every earlier token, and itself, twice
        q, k, v = (x.repeat_interleave(2, 2) for x in (q, k, v))
        truth = dense.reference(q[:, :, ::2], k[:, :, ::2], v[:, :, ::2], causal=True)
        out, lse = (x[:, :, 1::2] for x in run(case, q, k, v))
    else:
        out, lse = run(case, q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1), is_causal=False)
    assert_exact(out, truth[0].float())
    assert_exact(lse, (truth[1] + torch.tensor(2.0).log()).float())


# randomness


@both_masks
def test_the_seed_decides_every_bit_and_nothing_else_does(case, causal):
    q, k, v = tensors(case.num_tokens)
    state, python_state = torch.get_rng_state(), random.getstate()
    first = run(case, q, k, v, is_causal=causal, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert python_state == random.getstate()
    torch.manual_seed(1234)
    assert_all_same_bits(run(case, q, k, v, is_causal=causal, seed=3), first)
    draws = isinstance(case.method, Method) and case.method.complete
    for other in ({"seed": 4}, {"seed": 3, "layer": 1}, {"seed": 3 + 2**62}):
        same = torch.equal(run(case, q, k, v, is_causal=causal, **other)[0], first[0])
        assert same != draws, f"{other} must change the draws, and nothing where there are none"


def test_draws_do_not_depend_on_the_length(case):
    method, n = lists_of(case), case.num_tokens
    long = problem(2 * n)
    short = replace(long, q=long.q[:, :, :n], k=long.k[:, :, :n], v=long.v[:, :, :n])
    if method.looks_ahead == ha.LookAhead.SEQUENCE:
        pytest.skip("it declares that it looks at the whole sequence")
    rows = n if method.looks_ahead == ha.LookAhead.NOTHING else n // method.tile * method.tile
    assert_same_bits(dense.weights(method, long)[:, :rows, :n], dense.weights(method, short)[:, :rows])


# who may depend on whom


@both_masks
def test_batch_rows_and_heads_are_independent(case, causal):
    q, k, v = tensors(case.num_tokens, batch=2, heads=4)
    before = run(case, q, k, v, is_causal=causal)
    other = [x.clone() for x in (q, k, v)]
    for x in other:
        x[1] = -x[1].flip(1)
    after = run(case, *other, is_causal=causal)
    assert_all_same_bits([x[0] for x in after], [x[0] for x in before])
    assert not torch.equal(after[0][1], before[0][1])
    # the first kv head, and with it the first half of the query heads, is left alone
    other = [x.clone() for x in (q, k, v)]
    for x in other:
        x[:, x.shape[1] // 2 :] *= -1
    after = run(case, *other, is_causal=causal)
    assert_all_same_bits([x[:, :2] for x in after], [x[:, :2] for x in before])
    assert not torch.equal(after[0][:, 2:], before[0][:, 2:])


@both_masks
def test_a_group_of_equal_heads_is_one_head(case, causal):
    q, k, v = tensors(case.num_tokens, heads=2)
    alone = run(case, q, k, v, is_causal=causal)
    grouped = run(case, q.repeat_interleave(3, 1), k, v, is_causal=causal)
    for x, y in zip(grouped, alone, strict=True):
        assert_exact(x, y.repeat_interleave(3, 1))


@pytest.mark.parametrize("poison", [None, torch.nan, 1e30], ids=["other tokens", "nan", "huge"])
def test_later_tokens_change_no_earlier_row(case, poison):
    ahead = case.method.looks_ahead
    if ahead == ha.LookAhead.SEQUENCE:
        pytest.skip("it declares that it looks at the whole sequence")
    q, k, v = tensors(case.num_tokens)
    before = run(case, q, k, v)
    for last in edges(case):
        other = [x.clone() for x in (q, k, v)]
        for x in other:
            x[:, :, last + 1 :] = -x[:, :, last + 1 :].flip(2) if poison is None else poison
        after = run(case, *other)
        whole_tiles = ahead == ha.LookAhead.TILE or poison is not None and isinstance(case.method, Method)
        # what is not finite may spoil its own tile, where 0 times infinity is formed, and no other
        rows = (last + 1) // tile_of(case) * tile_of(case) if whole_tiles else last + 1
        assert_all_same_bits([x[:, :, :rows] for x in after], [x[:, :, :rows] for x in before])
        assert not torch.equal(after[0], before[0])


def test_later_tokens_change_no_earlier_row_of_a_padded_sequence(case):
    ahead = case.method.looks_ahead
    if ahead == ha.LookAhead.SEQUENCE:
        pytest.skip("it declares that it looks at the whole sequence")
    q, k, v = tensors(case.num_tokens)
    live = torch.arange(case.num_tokens)[None] >= 10
    before = run(case, q, k, v, key_mask=live)
    for last in edges(case):
        other = [torch.cat([x[:, :, : last + 1], -x[:, :, last + 1 :].flip(2)], 2) for x in (q, k, v)]
        after = run(case, *other, key_mask=live)
        rows = last + 1 if ahead == ha.LookAhead.NOTHING else (last + 1) // tile_of(case) * tile_of(case)
        assert_all_same_bits([x[:, :, :rows] for x in after], [x[:, :, :rows] for x in before])


def test_a_prompt_cut_at_tile_edges_equals_one_shot(case):
    if case.method.looks_ahead == ha.LookAhead.SEQUENCE:
        pytest.skip("it declares that it looks at the whole sequence")
    q, k, v = tensors(case.num_tokens, heads=4)
    tile, n = tile_of(case), case.num_tokens
    cuts = [0, tile, 3 * tile, n // tile * tile, n]
    chunks = [
        run(case, q[:, :, a:b], k[:, :, :b], v[:, :, :b], causal_align="lower_right")
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    for ours, expected in zip(zip(*chunks, strict=True), run(case, q, k, v), strict=True):
        assert_exact(torch.cat(ours, 2), expected)


@pytest.mark.parametrize("poison", [0.0, torch.nan, torch.inf])
@both_masks
def test_masked_keys_have_no_influence(case, causal, poison):
    q, k, v = tensors(case.num_tokens, batch=2)
    live = torch.ones(2, case.num_tokens, dtype=torch.bool)
    live[0, -30:], live[1, :21], live[1, 40:45] = False, False, False
    before = run(case, q, k, v, is_causal=causal, key_mask=live)
    dead = ~live[:, None, :, None]
    after = run(case, q, k.masked_fill(dead, poison), v.masked_fill(dead, poison), is_causal=causal, key_mask=live)
    assert_all_same_bits(after, before)


def test_padding_on_the_right_changes_nothing(case):
    q, k, v = tensors(case.num_tokens + 20)
    n = case.num_tokens
    alone = run(case, q[:, :, :n], k[:, :, :n], v[:, :, :n])
    padded = run(case, q, k, v, key_mask=torch.arange(n + 20)[None] < n)
    rows = n // tile_of(case) * tile_of(case)
    for x, y in zip(padded, alone, strict=True):
        assert_exact(x[:, :, :rows], y[:, :, :rows])


# the smallest sizes


@both_masks
@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 0), (0, 5), (5, 0), (1, 1), (1, 40), (40, 1)])
@pytest.mark.parametrize("align", ["upper_left", "lower_right"])
def test_few_tokens_or_none(case, causal, num_queries, num_keys, align):
    q, k, v = tensors(num_queries, num_keys, heads=4, value_dim=3)
    out, lse = run(case, q, k, v, is_causal=causal, causal_align=align)
    assert out.shape == (1, 4, num_queries, 3)
    assert lse.shape == (1, 4, num_queries)
    if num_keys <= 1 or causal and align == "upper_left":
        truth, plain = (f(q, k, v, causal=causal, align=align) for f in (dense.reference, dense.attention))
        for x, y, z in zip((out, lse), truth, plain, strict=True):
            assert_same_math(x, y, z)


def test_an_empty_batch(case):
    q, k, v = tensors(20, batch=0)
    out, lse = run(case, q, k, v)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
