"""From how many keys, and for how many queries, the methods that run by default approximate: the measured numbers."""

import pytest
import torch

import hyperattention as ha
from cases import CASES
from hyperattention import select
from hyperattention.methods.default import lean_method, thorough_method

# the least keys of a CPU and of a GPU; docs/log.md and docs/performance.md say by what measurements
LEAST = {ha.default_method: (32_768, 65_536), lean_method: (4096, 65_536), thorough_method: (40_960, 65_536)}


@pytest.mark.parametrize("choose", LEAST, ids=lambda choose: choose.__name__)
def test_a_method_runs_from_its_crossover_on(choose) -> None:
    on_cpu, on_gpu = LEAST[choose]
    for device, least in ((None, on_cpu), ("cpu", on_cpu), (torch.device("cuda", 1), on_gpu), ("cuda", on_gpu)):
        assert isinstance(choose(least - 1, device=device), ha.Exact)
        assert isinstance(choose(least, device=device), ha.Method)


@pytest.mark.parametrize("choose", LEAST, ids=lambda choose: choose.__name__)
def test_fewer_than_256_queries_are_served_exactly(choose) -> None:
    assert isinstance(choose(10**6, num_queries=255), ha.Exact)
    assert isinstance(choose(10**6, num_queries=256), ha.Method)
    assert isinstance(choose(4095, num_queries=4095), ha.Exact)


def test_what_runs_by_default_is_what_was_measured() -> None:
    measured = ha.Method(
        ha.Sinks(16), ha.Window(192), select.DrawAlike(640, rows=64, pooled=16, most=8192, candidates=12), tile=128
    )
    assert ha.default_method(32_768) == ha.default_method(10**9) == measured
    search = ha.Method(ha.Sinks(16), ha.Window(256), ha.Draw(688, by=ha.HierarchicalSearch()))
    assert lean_method(4096) == lean_method(131_071) == search != lean_method(131_072) == lean_method(10**9)


@pytest.mark.parametrize("choose", LEAST, ids=lambda choose: choose.__name__)
def test_one_method_serves_all_devices(choose) -> None:
    for num_keys in (65_536, 10**9):
        assert choose(num_keys, device="cuda") == choose(num_keys, device="mps") == choose(num_keys)


def test_the_laws_are_tested_on_what_runs_by_default() -> None:
    assert next(case for case in CASES if case.name == "default").method == ha.default_method(10**6)
