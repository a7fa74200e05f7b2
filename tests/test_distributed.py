"""Several processes give what one gives: outputs, lse and gradients, for every way in which tokens are shared."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import hyperattention as ha
import hyperattention.distributed as shared
from assertions import assert_exact
from hyperattention.distributed.seal import SIZE
from ranks import Raised, run_ranks
from shards import ALL, LOCAL, POOLED, Scenario, on_one, on_rank

pytestmark = pytest.mark.slow

FOUR = {
    "whole chunks": Scenario((64, 128, 64, 64)),
    "cut chunks and tiles": Scenario((101, 7, 93, 120)),
    "a rank without tokens, masks": Scenario((101, 0, 99, 120), masked=True),
    "head-tail": Scenario((64, 64, 64, 64), order=shared.HeadTail(), masked=True),
    "uneven head-tail, both sides": Scenario((71, 64, 50, 33), order=shared.HeadTail(), causal=False),
    "both sides, masks": Scenario((80, 80, 80, 11), causal=False, masked=True),
    "all keys": Scenario((101, 50, 93, 50), ALL),
    "all keys, both sides, masks": Scenario((80, 50, 80, 50), ALL, causal=False, masked=True),
    "an odd width": Scenario((101, 7, 93, 40), head_dim=15),
    "one chunk": Scenario((20, 20, 10, 14)),
    "gathered": Scenario((60, 33, 80, 21), LOCAL, gather=True),
    "gathered, exact": Scenario((60, 33, 80, 21), ha.Exact(), causal=False, masked=True, gather=True),
    "gathered head-tail": Scenario((40, 40, 40, 40), LOCAL, order=shared.HeadTail(), masked=True, gather=True),
}
EIGHT = {
    "eight": Scenario((128,) * 8),
    "eight, uneven": Scenario((97, 130, 64, 1, 200, 64, 90, 77), masked=True),
    "eight, head-tail": Scenario((64,) * 8, order=shared.HeadTail()),
}
# one machine holds two heads of queries, and each of two ranks one group of them
HEADS = Scenario((90, 70))


def _work(rank: int, scenarios: dict[str, Scenario], with_heads: bool) -> dict[str, object]:
    mesh = init_device_mesh("cpu", (len(next(iter(scenarios.values())).lengths),))
    found: dict[str, object] = {name: on_rank(rank, mesh, each) for name, each in scenarios.items()}
    if with_heads:
        found["heads"] = _with_heads()
    return found


def _with_heads() -> torch.Tensor:
    """Share tokens along one dimension of a mesh and heads along the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "cp"))
    part, rows = mesh.get_local_rank("tp"), HEADS.rows(mesh.get_local_rank("cp"))
    q, k, v, _ = (x.chunk(2, 1)[part][:, :, rows] for x in HEADS.tensors)
    options = {"mesh": mesh, "context": "cp", "heads": "tp", "method": POOLED, "enable_gqa": True, "seed": 3, "layer": 1}
    return shared.attention(q, k, v, True, **options)


@pytest.fixture(scope="module")
def of_four() -> list[dict]:
    return _all_well(run_ranks(4, _work, FOUR, True))


@pytest.fixture(scope="module")
def of_eight() -> list[dict]:
    return _all_well(run_ranks(8, _work, EIGHT, False))


def _all_well(answers: list) -> list[dict]:
    assert not [answer for answer in answers if isinstance(answer, Raised)], answers
    return answers


def _compare(found: list[dict], name: str, scenario: Scenario, expected: list[torch.Tensor]) -> None:
    for rank, answer in enumerate(found):
        (ours, _), rows = answer[name], scenario.rows(rank)
        for mine, whole in zip(ours, expected, strict=True):
            assert_exact(mine, whole[:, :, rows], size=whole.masked_fill(whole.isinf(), 0.0).abs().max().item())


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_give_what_one_machine_gives(of_four, name):
    _compare(of_four, name, FOUR[name], on_one(FOUR[name]))


@pytest.mark.heavy
@pytest.mark.parametrize("name", EIGHT)
def test_eight_ranks_give_what_one_machine_gives(of_eight, name):
    _compare(of_eight, name, EIGHT[name], on_one(EIGHT[name]))


@pytest.mark.parametrize("name", ["all keys", "all keys, both sides, masks"])
def test_a_budget_that_holds_every_key_is_exact(of_four, name):
    _compare(of_four, name, FOUR[name], on_one(FOUR[name], ha.Exact()))


def test_a_head_draws_the_same_keys_on_a_rank_that_holds_only_some_heads(of_four):
    whole = on_one(HEADS)[0]
    for number, answer in enumerate(of_four):
        part, rank = divmod(number, 2)
        assert_exact(answer["heads"], whole.chunk(2, 1)[part][:, :, HEADS.rows(rank)])


def test_bytes_are_those_of_slots_and_both_ends_count_the_same(of_four):
    traffic = [answer["whole chunks"][1] for answer in of_four]
    for purpose in dict.fromkeys(name for each in traffic for name in each.sent):
        assert sum(each.sent[purpose] for each in traffic) == sum(each.received[purpose] for each in traffic) > 0
    # rank 3 holds one chunk: of 2 x 2 lists it gets 24 keys and values, and 16 before its chunk; 8 bytes a number
    # a seal behind every message, from three ranks at most and from one
    assert 0 <= traffic[3].received["pool"] - 4 * 24 * (16 + 8) * 8 <= 3 * SIZE
    assert traffic[3].received["near"] == 4 * 16 * (16 + 8) * 8 + SIZE
    assert traffic[3].ring == 4 * 256 * (16 + 8) * 8
    assert "queries of cut tiles" not in traffic[3].sent
    gathered = [answer["gathered, exact"][1] for answer in of_four]
    assert all(each.received["near"] == each.ring + 3 * SIZE for each in gathered)
