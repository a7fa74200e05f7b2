"""The marks tell the truth: who computes for long is marked, and what is heavy is slow as well."""

import subprocess
import sys

import pytest

import conftest


def call(item: pytest.Item, body) -> None:
    around = conftest.pytest_runtest_call(item)
    next(around)
    body()
    with pytest.raises(StopIteration):
        around.send(None)


def compute() -> None:
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)


def test_a_long_test_without_the_mark_fails(request, monkeypatch):
    monkeypatch.setattr(conftest, "LONGEST", 0.01)
    call(request.node, lambda: None)
    with pytest.raises(pytest.fail.Exception, match="is not marked `slow`"):
        call(request.node, compute)
    request.node.add_marker(pytest.mark.slow)
    call(request.node, compute)


@pytest.mark.heavy
def test_what_is_heavy_is_slow(request):
    assert request.node.get_closest_marker("slow")
