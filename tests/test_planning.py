"""What each rank plans alone fits what all others plan, takes steps in proportion to the ranks, and is planned once."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import pytest
import torch
from torch import Tensor

import hyperattention as ha
import hyperattention.distributed as shared
from hyperattention.distributed.order import Segment
from hyperattention.distributed.plan import Plan, way_of
from hyperattention.methods.pooled_reader import near_route
from hyperattention.pooled.book import book_of
from hyperattention.pooled.route import Moves, Route, World, route_of

CPU = torch.device("cpu")
METHOD = shared.PooledChunks(ha.Method(ha.Sinks(4), ha.Window(16), tile=16), chunk=64, num=24, averages=2, near=16, sinks=4)
WAY = way_of(METHOD, False)


@dataclass(frozen=True)
class Rank(World):
    """One of many ranks, alone."""

    number: int
    ranks: int

    @property
    def rank(self) -> int:
        return self.number

    @property
    def size(self) -> int:
        return self.ranks

    def move(self, route: Route, x: Tensor) -> Tensor:
        raise NotImplementedError("a test of plans moves nothing")


def plan_of(world: Rank, segments: list[list[Segment]], causal: bool = True) -> Plan:
    return Plan.of(world, WAY, segments, causal)


def routes(world: Rank, segments: list[list[Segment]], causal: bool, lists: int) -> dict[str, Route]:
    plan = plan_of(world, segments, causal)
    book = book_of(plan.layout, world.rank, METHOD.sizes.groups)
    moves: dict[str, Moves | None] = {
        "outward": book.outward, "inward": book.inward, "forward": book.forward, "back": book.back, "cut": plan.moved
    }  # fmt: skip
    found = {name: route_of(name, world, each, lists, CPU) for name, each in moves.items() if each is not None}
    return found | {"near": near_route(world, plan.layout, lists, CPU)}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("order", [shared.Contiguous(), shared.HeadTail()], ids=["contiguous", "head-tail"])
def test_what_a_rank_sends_is_what_another_one_waits_for(causal, order):
    ranks, lists = 24, 3
    lengths = torch.randint(0, 150, (ranks,), generator=torch.Generator().manual_seed(1)).tolist()
    segments = order.segments(lengths)
    found = [routes(Rank(rank, ranks), segments, causal, lists) for rank in range(ranks)]
    assert "cut" in found[0]
    for name in found[0]:
        of = [each[name] for each in found]
        assert [[route.sent[to] for to in range(ranks)] for route in of] == [
            [to.received[at] for to in of] for at in range(ranks)
        ]
        for rank, route in enumerate(of):
            assert route.sent[rank] == route.received[rank] == 0
            assert len(route.send) == sum(route.sent)
            assert len(route.place) == sum(route.received)
            # every row of the result comes from one row
            assert torch.cat([route.place, route.put]).sort().values.equal(torch.arange(route.rows))
    assert sum(sum(route.sent) for route in (each["outward"] for each in found)) > 0


def steps(call: Callable[[], object]) -> int:
    """Count the instructions of Python that a call runs."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> Callable:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_a_plan_made_in_inference_mode_serves_training():
    segments = shared.Contiguous().segments([80] * 6)
    with torch.inference_mode():
        routes(Rank(2, 6), segments, True, 1)
    for route in routes(Rank(2, 6), segments, True, 1).values():
        assert not any(each.is_inference() for each in (route.send, route.place, route.kept, route.put))


@pytest.mark.slow
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
@pytest.mark.parametrize("length", [64, 60], ids=["whole", "cut"])
def test_steps_grow_as_the_ranks_do(place, length):
    taken = []
    for ranks in (64, 512):
        world, segments = Rank(round(place * (ranks - 1)), ranks), shared.Contiguous().segments([length] * ranks)
        taken.append(steps(lambda world=world, segments=segments: routes(world, segments, True, 1)))
    # 8 times as many ranks, 64 times as many pairs of ranks; a part of the steps does not depend on either
    assert taken[1] < 8 * taken[0]


def test_a_plan_of_the_same_shards_is_made_once():
    segments = shared.Contiguous().segments([64] * 8)
    first, again = (plan_of(Rank(3, 8), [list(own) for own in segments]) for _ in range(2))
    assert first is again
    assert book_of(first.layout, 3, 2) is book_of(again.layout, 3, 2)
    assert plan_of(Rank(4, 8), segments).cells != first.cells
    assert plan_of(Rank(3, 8), shared.Contiguous().segments([63] * 8)).layout.keys != first.layout.keys
