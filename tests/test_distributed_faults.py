"""A rank that damages, loses or mistakes messages, or fails in the middle: an error on every rank or the right output."""

import time
from contextlib import nullcontext
from datetime import timedelta
from importlib import import_module
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import hyperattention as ha
import hyperattention.distributed as shared
from assertions import assert_exact
from faults import Fault, flipped, lengthened, lost, raised, repeated, shortened, swapped
from hyperattention.pooled import choose
from hyperattention.pooled.averages import packed, unpacked
from ranks import Raised, run_ranks
from shards import ALL, Scenario, on_one, on_rank

pytestmark = pytest.mark.slow

SCENARIO = Scenario((64, 64, 64))
# seconds that an exchange may take
LIMIT = 2.0
# exchanges of a call by number: headers, near, averages, sums, totals, counts, replies, weights, pool; backward has two more
FAULTS = {
    "a bit of the headers": Fault(0, flipped),
    "headers of each other": Fault(0, swapped),
    "a bit of the averages": Fault(2, flipped),
    "sums cut short": Fault(3, shortened),
    "averages in place of totals": Fault(4, repeated),
    "replies lost": Fault(6, lost),
    "a bit of drawn keys": Fault(8, flipped),
    "a failure in the middle": Fault(5, raised),
    "a bit of a gradient": Fault(9, flipped),
}


def _mesh() -> DeviceMesh:
    """Make a mesh whose ranks are in step, whatever happened to those before."""
    return DeviceMesh.from_group(dist.new_group(range(3), timeout=timedelta(seconds=LIMIT)), "cpu")


def _attempt(rank: int, mesh: DeviceMesh) -> tuple[float, list[torch.Tensor] | Raised]:
    """Run forward and backward; give the seconds, and all results or the error."""
    began = time.perf_counter()
    try:
        found: list[torch.Tensor] | Raised = on_rank(rank, mesh, SCENARIO)[0]
    except Exception as error:
        found = Raised(type(error).__name__, str(error))
    return time.perf_counter() - began, found


def _faulty(rank: int, names: list[str]) -> dict[str, tuple[float, list[torch.Tensor] | Raised]]:
    found = {}
    for name in names:
        mesh = _mesh()
        if rank == 1:
            with FAULTS[name].planted():
                found[name] = _attempt(rank, mesh)
        else:
            found[name] = _attempt(rank, mesh)
        if name == "a failure in the middle":
            found["again"] = _attempt(rank, mesh)
        # of the group in which all ranks are still in step
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def faulty() -> list[dict]:
    answers = run_ranks(3, _faulty, list(FAULTS))
    assert not [answer for answer in answers if isinstance(answer, Raised)], answers
    return answers


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_message_is_never_read(faulty, name):
    errors, expected = [], on_one(SCENARIO)
    for rank, answer in enumerate(faulty):
        seconds, found = answer[name]
        # forward and backward have a limit each, on a busy machine
        assert seconds < 4 * LIMIT
        if isinstance(found, Raised):
            errors.append(found)
            continue
        for mine, whole in zip(found, expected, strict=True):
            assert_exact(mine, whole[:, :, SCENARIO.rows(rank)], size=whole.abs().max().item())
    assert len(errors) >= 2
    own = [error for error in errors if "planted" in error.text]
    assert all("start all ranks again" in error.text for error in errors if error not in own)
    assert own or [error for error in errors if "what came from ranks [1] is not what they were to send" in error.text]


def test_no_rank_uses_a_group_on_after_a_failure(faulty):
    for answer in faulty:
        seconds, found = answer["again"]
        assert isinstance(found, Raised)
        assert "an earlier exchange of this process group failed" in found.text
        assert seconds < LIMIT


class Gone(Exception):
    """The error that is expected, with the seconds that it took."""


def _ended(rank: int) -> None:
    """Rank 1 sends more than it should: gloo ends the process that gets it, and the others fail at once."""
    mesh, began = _mesh(), time.perf_counter()
    try:
        if rank == 1:
            with Fault(3, lengthened).planted():
                on_rank(rank, mesh, SCENARIO)
        on_rank(rank, mesh, SCENARIO)
    except shared.ExchangeError as error:
        raise Gone(f"{time.perf_counter() - began} {error}") from error
    raise AssertionError("an output was returned")


def test_a_message_that_is_too_long_ends_the_call():
    answers = run_ranks(3, _ended, silent=1)
    # sums go from the first ranks to the last one
    assert answers[2] is None
    for answer in answers[:2]:
        assert answer.kind == "Gone", answer
        seconds, _, text = answer.text.partition(" ")
        assert "the exchange of" in text
        assert float(seconds) < 2 * LIMIT


def _times(data: torch.Tensor, number: float) -> torch.Tensor:
    """Multiply packed averages."""
    mean, log_rows = unpacked(data, torch.float64).split([data.shape[2] - 4, 1], 2)
    return packed(mean * number, log_rows[..., 0])


def _misled(rank: int) -> dict[str, object]:
    """Rank 1 takes another rank to hold fewer tokens, or has averages that are no numbers."""
    front, spoiled = import_module("hyperattention.distributed.attention"), rank == 1
    agree, averages = front.agree, choose.averages
    fewer = mock.patch.object(
        front, "agree", lambda *given: [size - 16 * (at == 2) for at, size in enumerate(agree(*given))]
    )
    found: dict[str, object] = {}
    with fewer if spoiled else nullcontext():
        found["lengths"] = _attempt(rank, _mesh())
    dist.barrier()
    for name, number in (("nan", torch.nan), ("infinity", torch.inf)):
        other = mock.patch.object(choose, "averages", lambda *given, number=number: _times(averages(*given), number))
        with other if spoiled else nullcontext():
            found[name] = on_rank(rank, _mesh(), Scenario(SCENARIO.lengths, ALL))[0]
    mesh, bad = init_device_mesh("cpu", (3,)), SCENARIO.tensors[0].clone()
    bad[0, 1, 70] = torch.nan
    rows = SCENARIO.rows(rank)
    q, k, v = (x[:, :, rows] for x in (bad, *SCENARIO.tensors[1:3]))
    found["a query"] = shared.attention(q, k, v, True, mesh=mesh, method=SCENARIO.method, enable_gqa=True)
    return found


@pytest.fixture(scope="module")
def misled() -> list[dict]:
    answers = run_ranks(3, _misled)
    assert not [answer for answer in answers if isinstance(answer, Raised)], answers
    return answers


def test_shards_of_other_sizes_than_announced(misled):
    errors = [answer["lengths"][1] for answer in misled]
    assert all(isinstance(error, Raised) and error.kind == "ExchangeError" for error in errors), errors
    assert all(answer["lengths"][0] < 4 * LIMIT for answer in misled)


@pytest.mark.parametrize("name", ["nan", "infinity"])
def test_averages_that_are_no_numbers_change_nothing_where_budgets_hold_every_key(misled, name):
    expected = on_one(SCENARIO, ha.Exact())
    for rank, answer in enumerate(misled):
        for mine, whole in zip(answer[name], expected, strict=True):
            assert_exact(mine, whole[:, :, SCENARIO.rows(rank)], size=whole.abs().max().item())


def test_a_query_that_is_no_number_spoils_its_own_row_alone(misled):
    q, k, v, _ = SCENARIO.tensors
    q[0, 1, 70] = torch.nan
    whole = ha.attention(q, k, v, is_causal=True, method=SCENARIO.method, enable_gqa=True)
    bad = torch.zeros(whole.shape[:3], dtype=torch.bool)
    bad[0, 1, 70] = True
    found = torch.cat([answer["a query"] for answer in misled], 2)
    assert torch.equal(found.isnan().any(3), bad)
    assert_exact(found[~bad], whole[~bad], size=whole[~bad].abs().max().item())
