"""The laws of the cover, over each line of cases.py: who is listed, how often, and what attention then does."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dense
from assertions import assert_exact, assert_same_math, assert_unbiased
from cases import CASES, Case
from hyperattention.methods.method import Method
from hyperattention.problem import Problem
from pair_weights import pair_weights
from problems import problem, tensors
from run_case import both_masks, lists_of, run

pytestmark = [pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)]

# draws of the test of expectations: a number fixed beforehand, whatever the first ones show
HEADS, SEEDS, FEW_SEEDS = 8, 8, 3
# tokens beyond which few do, for every draw is made by many tiles; weights measured through attention are slow as well
LONG = 1000
# of weights whose logarithms are float32
ROUNDING = 1e-5


def weights_of(case: Case, asked: Problem) -> Tensor:
    """Weights of every head, ``[heads, queries, keys]``, from the lists where there are any."""
    if isinstance(case.method, Method):
        return dense.weights(case.method, asked)[0]
    return pair_weights(case.method, asked.q.double(), asked.k.double(), is_causal=asked.causal, seed=asked.seed)[0]


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
        # weights read off an output are rounded; a key listed twice adds one or more
        assert total.max() <= HEADS * len(statistics) + ROUNDING, "an incomplete method lists a key more than once"
        assert (total[seen == 1] == 0).any(), "it lists every key: let it declare itself complete"


@both_masks
def test_indices_are_in_range_and_blocks_ascend(case, causal):
    method = lists_of(case)
    (tiles, shared), *apart = method.selections(problem(case.num_tokens, causal=causal))
    assert len(tiles.index) == -(-case.num_tokens // tiles.size)
    for selection in (shared, *(lists for _, lists in apart)):
        assert selection.row_limit.max() <= case.num_tokens
        assert torch.equal(selection.key_row, torch.arange(2))
        for slots in selection.runs:
            index, live = dense.listed(slots)
            assert not (live & ((index < 0) | (index >= case.num_tokens))).any()
    for slots in shared.runs:
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
