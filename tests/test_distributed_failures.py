"""A rank that refuses its arguments, ends or is slow: every rank raises an error that says what to do, and none waits."""

import os
import time
from datetime import timedelta

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import hyperattention as ha
import hyperattention.distributed as shared
from ranks import Raised, run_ranks
from shards import LOCAL, POOLED, Scenario

pytestmark = pytest.mark.slow

LENGTHS = (64, 64, 64)
# seconds that an exchange may take; the slow rank takes longer
LIMIT = 4.0


def _call(rank: int, mesh, **options) -> torch.Tensor:
    scenario = Scenario(LENGTHS)
    q, k, v, _ = (x[:, :, scenario.rows(rank)] for x in scenario.tensors)
    options = {"q": q, "k": k, "v": v, "is_causal": True, "method": POOLED, "enable_gqa": True} | options
    tensors = [options.pop(name) for name in ("q", "k", "v")]
    return shared.attention(*tensors, mesh=mesh, **options)


def _wrong(rank: int) -> dict[str, object]:
    """Calls of which rank 1 refuses its arguments, or gives others than the rest."""
    mesh, two, odd = init_device_mesh("cpu", (3,)), torch.zeros(2, 2, 64, 16).double(), rank == 1
    calls = {
        "shape": {"k": two[:, :, :5]} if odd else {},
        "batch": {name: Scenario(LENGTHS).tensors[at][:1, :, :64] for at, name in enumerate("qkv")} if odd else {},
        "seed": {"seed": 7 if odd else 0},
        "dtype": {name: Scenario(LENGTHS).tensors[at][:, :, :64].float() for at, name in enumerate("qkv")} if odd else {},
        "method": {"method": shared.PooledChunks(LOCAL, chunk=128, num=24, near=16) if odd else POOLED},
        "order": {"order": shared.HeadTail() if odd else shared.Contiguous()},
        "gather": {"method": LOCAL},
        "mask": {"key_mask": torch.ones(2, 3, dtype=torch.bool)} if odd else {},
    }
    found: dict[str, object] = {}
    for name, options in calls.items():
        try:
            found[name] = _call(rank, mesh, **options)
        except Exception as error:
            found[name] = Raised(type(error).__name__, str(error))
    # the group still works
    found["right"] = _call(rank, mesh)
    return found


@pytest.fixture(scope="module")
def wrong() -> list[dict]:
    answers = run_ranks(3, _wrong)
    assert not [answer for answer in answers if isinstance(answer, Raised)], answers
    return answers


@pytest.mark.parametrize(
    ("name", "own", "others"),
    [
        ("shape", "key and value must have the same heads and tokens", "rank 1 of 3 refused its arguments"),
        ("mask", "key_mask has shape", "rank 1 of 3 refused its arguments"),
        ("batch", "batch differs between the ranks: 2, 1, 2", "batch differs between the ranks: 2, 1, 2"),
        ("dtype", "rank 0 has kind 1, rank 1 has kind 2, rank 2 has kind 1", "dtype differs between the ranks"),
        ("seed", "seed differs between the ranks: 0, 7, 0", "seed differs between the ranks"),
        ("method", "rank 0 has kind 1, rank 1 has kind 2", "method differs between the ranks"),
        ("order", "order differs", "order differs"),
        ("gather", "pass gather=True", "pass gather=True"),
    ],
)
def test_every_rank_raises_what_one_rank_refuses(wrong, name, own, others):
    assert own in wrong[1][name].text
    assert all(others in wrong[rank][name].text for rank in (0, 2))
    assert all(torch.isfinite(answer["right"]).all() for answer in wrong)


def _gone(rank: int, kill: bool) -> tuple[float, str, str]:
    """Rank 1 ends, or sleeps, before its second call."""
    mesh = init_device_mesh("cpu", (3,))
    _call(rank, mesh)
    torch.distributed.barrier()
    if rank == 1 and kill:
        os._exit(1)
    if rank == 1:
        time.sleep(3 * LIMIT)
    begun = time.perf_counter()
    try:
        _call(rank, mesh, timeout=timedelta(seconds=LIMIT))
    except shared.ExchangeError as error:
        text = str(error)
        # nor is the group used on: the next call fails at once, or within the limit
        try:
            _call(rank, mesh, timeout=timedelta(seconds=LIMIT))
        except shared.ExchangeError:
            raise Gone(f"{time.perf_counter() - begun} {text}") from error
        raise AssertionError("a second call went through") from error
    raise AssertionError("an output was returned")


class Gone(Exception):
    """The error that is expected, with the seconds that it took."""


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "slow"])
def test_a_rank_that_is_gone_or_slow_ends_the_call_of_all_others(kill):
    answers = run_ranks(3, _gone, kill, silent=1 if kill else 0)
    for rank in (0, 2) if kill else (0, 1, 2):
        assert answers[rank].kind == "Gone", answers[rank]
        seconds, _, text = answers[rank].text.partition(" ")
        assert "the exchange of" in text
        assert "start all ranks again" in text
        # two calls, each within its limit, on a busy machine
        assert float(seconds) < 4 * LIMIT


def test_arguments_that_need_no_other_rank():
    with pytest.raises(ValueError, match="must be multiples of the tile"):
        shared.PooledChunks(chunk=100)
    with pytest.raises(ValueError, match="and divide the chunk"):
        shared.PooledChunks(block=64)
    with pytest.raises(ValueError, match="room for more than sinks"):
        shared.PooledChunks(num=16)
    with pytest.raises(ValueError, match="chooses by all tokens"):
        shared.PooledChunks(ha.Method(ha.HashBuckets(16)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        shared.PooledChunks(uniform_share=1.0)
