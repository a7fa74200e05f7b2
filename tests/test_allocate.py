"""Pairs go to the heads whose errors move the model's predictions most, and never exceed what is allowed."""

import itertools
import math

import pytest
import torch

import hyperattention as ha

pytest.importorskip("transformers")
from hyperattention.calibration.allocate import allocate
from hyperattention.calibration.candidates import candidates_by_pairs
from hyperattention.calibration.measure import Measurement

LENGTH = 2000
LADDER = (ha.Exact(), *(ha.Method(ha.Sinks(4), ha.Window(size), tile=4) for size in (12, 32, 72, 152)))
# 20, 40, 80 and 160 pairs; exact attention lists 1,000.5
COSTS = [method.cost(LENGTH).pairs for method in LADDER]


def measurement(layer: int, squares: list[list[float]], document: int = 0) -> Measurement:
    table = tuple(map(tuple, squares))
    return Measurement(document, layer, (4, 2, 16, 16), (), table, table)


def places(measured: list[Measurement], weights: dict, pairs: int) -> list[int]:
    chosen = allocate(measured, LADDER, weights, pairs, LENGTH)
    return [LADDER.index(method) for served, _ in chosen.values() for method in served.methods]


HALVING = [[0.0, 0.0], [0.16, 0.16], [0.08, 0.08], [0.04, 0.04], [0.02, 0.02]]


def test_heads_of_large_weight_get_the_pairs() -> None:
    assert COSTS == [1000.5, 20, 40, 80, 160]
    two = [measurement(0, HALVING), measurement(1, HALVING)]
    assert places(two, {0: (1.0, 1.0), 1: (1.0, 1.0)}, 80) == [3, 3, 3, 3]
    assert places(two, {0: (0.0, 1.0), 1: (0.001, 0.0)}, 60) == [1, 4, 2, 1]
    # enough for everything: no error is left
    assert places(two, {0: (1.0, 1.0), 1: (1.0, 1.0)}, 1001) == [0, 0, 0, 0]
    # a head without weight stays with the cheapest even then
    assert places(two, {0: (0.0, 1.0), 1: (1.0, 1.0)}, 1001) == [1, 0, 0, 0]


def test_the_mean_over_documents_decides_and_the_worst_is_told() -> None:
    worse = [[0.0, 0.0], [0.5, 0.16], [0.5, 0.08], [0.5, 0.04], [0.0, 0.02]]
    measured = [measurement(0, HALVING), measurement(0, worse, document=1)]
    chosen = allocate(measured, LADDER, {0: (1.0, 1.0)}, 100, LENGTH)
    assert [LADDER.index(method) for method in chosen[0][0].methods] == [4, 2]
    assert chosen[0][1] == (0.02, 0.08)
    ((served, _),) = allocate(measured[:1], LADDER, {0: (1.0, 1.0)}, 100, LENGTH).values()
    assert [LADDER.index(method) for method in served.methods] == [3, 3]


def test_neither_the_first_document_nor_the_worst_decides() -> None:
    one = [[0.0, 0.0], [0.2, 0.5], [0.1, 0.35], [0.1, 0.35], [0.1, 0.35]]
    other = [[0.0, 0.0], [0.2, 0.02], [0.1, 0.02], [0.1, 0.02], [0.1, 0.02]]
    # pairs for one step: it saves .1 in the first head, and in the second .15 and nothing
    assert places([measurement(0, one), measurement(0, other, document=1)], {0: (1.0, 1.0)}, 30) == [2, 1]
    assert places([measurement(0, one)], {0: (1.0, 1.0)}, 30) == [1, 2]


def test_pairs_that_no_step_of_the_hull_needs_are_spent_all_the_same() -> None:
    # on the hull the first head goes from 20 pairs to 160, which is more than is allowed
    bent = [[0.0, 0.0], [0.5, 0.0], [0.45, 0.0], [0.4, 0.0], [0.0, 0.0]]
    assert places([measurement(0, bent)], {0: (1.0, 1.0)}, 60) == [3, 1]
    assert places([measurement(0, bent)], {0: (1.0, 1.0)}, 45) == [2, 1]


def test_no_choice_on_the_hull_is_better() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        squares = torch.rand(5, 4, generator=generator).sort(0, descending=True).values
        squares[0] = 0
        order = [0, 1, 2, 3, 4]
        measured = [measurement(0, squares[order, :2].tolist()), measurement(1, squares[order, 2:].tolist())]
        weights = torch.rand(4, generator=generator).tolist()
        found = places(measured, {0: tuple(weights[:2]), 1: tuple(weights[2:])}, 100)

        def damage(each: tuple[int, ...], squares=squares, weights=weights) -> float:
            return sum(weights[head] * squares[place, head].item() for head, place in enumerate(each))

        spent = sum(COSTS[place] for place in found)
        assert spent <= 400
        # no other choice of the same pairs, or fewer, damages less
        every = itertools.product(range(5), repeat=4)
        best = min(damage(each) for each in every if sum(COSTS[place] for place in each) <= 400)
        cheaper = min(damage(each) for each in itertools.product(range(5), repeat=4) if sum(COSTS[p] for p in each) <= 260)
        assert best <= damage(tuple(found)) <= cheaper


def test_what_was_not_measured_well_is_not_chosen() -> None:
    broken = [[0.0, 0.0], [math.nan, 0.16], [math.inf, math.nan], [0.04, math.nan], [0.02, 0.02]]
    assert places([measurement(0, broken)], {0: (1.0, 1.0)}, 160) == [4, 4]
    assert places([measurement(0, broken)], {0: (1.0, 1.0)}, 60) == [3, 1]


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="19 pairs a query: the cheapest candidates list 20 on average; allow at least"):
        places([measurement(0, HALVING)], {0: (1.0, 1.0)}, 19)


def test_candidates_by_pairs_list_fewer_pairs_than_exact_attention() -> None:
    assert candidates_by_pairs(64) == (ha.Exact(),)
    ladder = candidates_by_pairs(32_768)
    assert isinstance(ladder[0], ha.Exact)
    assert len(set(ladder)) == len(ladder)
    assert all(method.cost(32_768).share_of_exact < 1 for method in ladder[1:])
    # parts of a sample are whole tiles of every candidate
    assert {256 % method.tile for method in ladder[1:] if isinstance(method, ha.Method)} == {0}
