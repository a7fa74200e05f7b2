"""Edges of tiles as a GPU computes them: one launch, and the numbers of the stages that PyTorch runs."""

from dataclasses import fields, replace

import pytest
import torch

import hyperattention as ha
from assertions import assert_same_bits
from hyperattention.problem import Problem
from hyperattention.select import placed as module
from hyperattention.select.placed import placed
from hyperattention.select.score.pooling import edges_of
from hyperattention.select.stage import CoveredKeys
from hyperattention.types import Runs
from problems import problem

pytestmark = pytest.mark.usefixtures("triton_kernel")
TILE = 16


def masked(given: Problem) -> Problem:
    shown = torch.rand(given.k.shape[0], given.num_keys, generator=torch.Generator().manual_seed(1)) < 0.7
    return replace(given, rank=shown.cumsum(1))


def late(given: Problem, offset: int) -> Problem:
    return replace(given, q=given.q[:, :, offset:], offset=offset)


GIVEN = {
    "causal": problem(70, heads=6, kv_heads=3),
    "all keys": problem(70, heads=2, kv_heads=1, batch=2, causal=False),
    "a chunk": late(problem(90, heads=2), 37),
    "masked keys": masked(problem(100, heads=4, kv_heads=2, batch=2)),
    "masked keys, all of them": masked(problem(50, batch=2, causal=False)),
    "spans": problem(256, heads=2).of_spans(32, 32, 96),
    "more queries than keys": replace(problem(70), offset=30),
    "one query": late(problem(70), 69),
}
STAGES = {
    "sinks, then a window": (ha.Sinks(5), ha.Window(24), ha.Draw(8)),
    "a window": (ha.Window(9), ha.Draw(8)),
    "a short window": (ha.Window(1), ha.Draw(8)),
    "sinks alone": (ha.Sinks(40), ha.Draw(8)),
    "a window, then sinks": (ha.Window(24), ha.Sinks(5), ha.Draw(8)),
    "neither": (ha.Draw(8),),
}


def all_tensors(x) -> list[torch.Tensor]:
    """Every tensor of a value, but for those of the problem."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, tuple):
        return [y for each in x for y in all_tensors(each)]
    if hasattr(x, "__dataclass_fields__") and not isinstance(x, Problem):
        return [y for field in fields(x) for y in all_tensors(getattr(x, field.name))]
    return []


def taken_by_place(given: Problem, stages: tuple) -> tuple:
    """All that the stages before a draw list, and what they leave."""
    begun = placed(given, stages, TILE)
    covered, runs = begun.covered, begun.runs
    for stage in begun.rest[:-1]:
        more, covered = stage.select(begun.tiles, covered)
        runs += more
    edges = edges_of(begun.tiles, covered)
    return begun.tiles, replace(covered, edges=None), runs, edges, begun.row_limit, begun.key_row


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_one_launch_computes_what_the_stages_do(given, stages, monkeypatch):
    expected = taken_by_place(given, stages)
    monkeypatch.setattr(module, "triton_reads", lambda *tensors: True)
    ours = taken_by_place(given, stages)
    assert all(same(a, b) for a, b in zip(expected[2], ours[2], strict=True))
    assert (ours[1].prefix, ours[1].placed, ours[1].near) == (expected[1].prefix, expected[1].placed, expected[1].near)
    pairs = list(zip(all_tensors(ours), all_tensors(expected), strict=True))
    assert len(pairs) >= 10
    for a, b in pairs:
        # without masked keys PyTorch has edges once for the whole batch
        assert_same_bits(a, b.expand_as(a))


def same(a: Runs, b: Runs) -> bool:
    return (a.size, a.causal, a.labelled, a.sample) == (b.size, b.causal, b.labelled, b.sample)


def test_numbers_of_tiles_that_kernels_read_are_contiguous(monkeypatch):
    monkeypatch.setattr(module, "triton_reads", lambda *tensors: True)
    begun = placed(GIVEN["causal"], STAGES["sinks, then a window"], TILE)
    edges = begun.covered.edges
    assert edges is not None
    read = [x for run in begun.runs for x in (run.first, run.log_weight, run.low, run.high)]
    assert all(x.is_contiguous() for x in (*read, edges.of_tile, edges.begin, edges.end, begun.row_limit))


def test_other_keys_taken_by_position_make_other_edges(monkeypatch):
    """Edges are those of the stages that ran, not of the leading ones alone."""
    monkeypatch.setattr(module, "triton_reads", lambda *tensors: True)
    given = GIVEN["causal"]
    begun = placed(given, STAGES["a window, then sinks"], TILE)
    _, covered = begun.rest[0].select(begun.tiles, begun.covered)
    assert covered.edges is None
    assert covered != CoveredKeys()


def test_spans_that_are_not_tiles_are_refused(monkeypatch):
    monkeypatch.setattr(module, "triton_reads", lambda *tensors: True)
    with pytest.raises(ValueError, match="not complete tiles of 16"):
        placed(problem(256).of_spans(0, 24, 64), STAGES["neither"], TILE)
