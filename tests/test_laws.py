"""What holds for every method, whatever it chooses: the laws, over each line of cases.py."""

import itertools
from dataclasses import replace

import pytest
import torch

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_same_math
from cases import CASES
from problems import problem, tensors
from run_case import assert_all_same_bits, both_masks, edges, lists_of, nothing_ahead, run, tile_of, unharmed

pytestmark = [pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)]

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
    ours, alone = dense.weights(method, long)[:, :, :n, :n], dense.weights(method, short)
    assert_same_bits(ours > 0, alone > 0)
    if case.method.looks_ahead == ha.LookAhead.NOTHING:
        assert_same_bits(ours, alone)
    else:  # a matrix product of another shape may round the estimates otherwise
        assert_exact(ours.float(), alone.float())


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
    grouped = run(replace(case, method=case.for_three or case.method), q.repeat_interleave(3, 1), k, v, is_causal=causal)
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
    # lists are the same; bits too, but where weights are estimated by softmax over as many keys as the chunk has
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
