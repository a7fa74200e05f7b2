"""The mark `slow` is on every test that computes for long, and on every heavy test."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from threading import Thread
from types import SimpleNamespace

import pytest

import conftest


class Item:
    """What the hooks know of a test."""

    def __init__(self, *marks: str) -> None:
        self.stash, self.config = pytest.Stash(), SimpleNamespace(stash=pytest.Stash())
        self.get_closest_marker = marks.count


def around(hook: Generator, body: Callable[[], object]) -> None:
    """Run what a hook stands around."""
    next(hook)
    body()
    with pytest.raises(StopIteration):
        hook.send(None)


# seconds that are long here: ten ticks of the clock of processes, so that the odd tick of another thread decides nothing
LONG = 0.1


def rest() -> None:
    time.sleep(2 * LONG)


def in_a_child() -> None:
    subprocess.run([sys.executable, "-c", f"import time\nwhile time.process_time() < {3 * LONG}: pass"], check=True)


def spin() -> None:
    begun = time.thread_time()
    while time.thread_time() < begun + 3 * LONG:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000)


def in_a_thread() -> None:
    thread = Thread(target=spin)
    thread.start()
    thread.join()


@pytest.fixture
def run(monkeypatch):
    """Set up and run a test, where a tenth of a second is long."""

    def run(item: Item, setup: Callable[[], object], body: Callable[[], object]) -> None:
        # undone here: the hooks stand around this test as well
        with monkeypatch.context() as patch:
            patch.setattr(conftest, "LONGEST", LONG)
            around(conftest.pytest_runtest_setup(item), setup)
            around(conftest.pytest_runtest_call(item), body)

    return run


@pytest.mark.parametrize("compute", [in_a_child, in_a_thread])
def test_a_long_test_without_the_mark_fails(compute, run):
    run(Item(), rest, rest)
    for setup, body in ((rest, compute), (compute, rest)):
        with pytest.raises(pytest.fail.Exception, match="is not marked `slow`"):
            run(Item(), setup, body)
        run(Item("slow"), setup, body)


def test_a_fixture_that_tests_share_is_none_of_theirs(run):
    item = Item()

    def fixture(scope: str, body: Callable[[], object]) -> None:
        around(conftest.pytest_fixture_setup(SimpleNamespace(scope=scope), item), body)

    # one fixture asks for another, before the test or while it runs
    def shared() -> None:
        fixture("module", lambda: (in_a_thread(), fixture("session", in_a_thread)))

    run(item, shared, shared)
    with pytest.raises(pytest.fail.Exception, match="is not marked `slow`"):
        run(item, lambda: fixture("function", lambda: (shared(), in_a_thread())), rest)


@pytest.mark.parametrize("later", [(7.0, 3.0), (3.0, 7.0)], ids=["on a busy machine", "in several threads"])
def test_neither_waiting_nor_threads_beside_one_another_count(later, monkeypatch):
    monkeypatch.setattr(conftest, "clocks", lambda: later)
    assert conftest.computed_since((1.0, 1.0)) == 2.0


@pytest.mark.heavy
def test_what_is_heavy_is_slow(request):
    assert request.node.get_closest_marker("slow")
