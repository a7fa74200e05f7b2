"""What every test runs under: shapes checked at run time, no network, no fight over cores."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import pytest
from jaxtyping import install_import_hook

if "hyperattention" in sys.modules:
    raise RuntimeError(
        "hyperattention was imported before tests/conftest.py: its annotations would go unchecked; "
        "import it in tests, not in plugins or on pytest's command line"
    )
# every annotation of the package, and of nothing else, is checked on each call
install_import_hook("hyperattention", "beartype.beartype")
# but for kernels: Triton reads their source, not what a decorator made of them
(finder,) = (x for x in sys.meta_path if type(x).__module__.startswith("jaxtyping"))
checked = finder.should_instrument
finder.should_instrument = lambda module: "triton" not in module and checked(module)

# a test that reaches for a model hub fails at once, instead of waiting for a download
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402 - the hook and the environment come first

# the real engine of vLLM has an environment of its own: `make test-vllm`; without an origin, tests/vllm itself was found
found = importlib.util.find_spec("vllm")
collect_ignore = [] if found and found.origin else ["vllm"]

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, which has to be asked for before they are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # the workers are the parallelism
    torch.set_num_threads(1)


# seconds that a test without the mark `slow`, with the fixtures that are its own, may compute: thrice what the mark says, as
# machines differ
LONGEST = 10.0

# files of many small models, interpreted kernels or statistics: no case is slow by itself, and all of a file are together
SLOW_FILES = frozenset(
    f"test_{name}.py"
    for name in (
        "audited_generation", "cache_file", "cache_goes_on", "cache_masks", "cache_served", "calibrate", "cli",
        "cli_evaluation", "cli_generation", "compress", "compressing_store", "cover", "error_calibration",
        "evaluation", "families", "feature_kernel", "fused", "global_defaults", "gpu_benchmark", "hyper_cache",
        "import", "paged", "pareto", "placed", "scatterbrain", "standard_error",
        "subgen", "subgen_store", "tolerance", "transformers",
        "transformers_use", "transforms", "triton", "triton_alike", "triton_decode", "triton_feature", "triton_flat",
        "triton_parts", "triton_search", "triton_selection", "triton_sort_alike",
        "poly_sketch_attention", "polynomial_sketch",
    )
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("heavy") or item.path.name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


# seconds that a test has computed, with the fixtures that are its own; and all fixtures that several tests share
OWN, SHARED = pytest.StashKey[float](), pytest.StashKey[float]()


def clocks() -> tuple[float, float]:
    """Read the time, and the processor time of all threads of this process and of its ended child processes."""
    return time.perf_counter(), sum(os.times()[:4])


def computed_since(begun: tuple[float, float]) -> float:
    """Seconds of computing: waiting for a busy machine does not count, nor do threads beside one another count twice."""
    return min(now - then for now, then in zip(clocks(), begun, strict=True))


@contextmanager
def counted(item: pytest.Item) -> Iterator[None]:
    """Add to a test what is computed meanwhile, but for fixtures that it shares with other tests."""
    shared, begun = item.config.stash.get(SHARED, 0.0), clocks()
    yield
    shared = item.config.stash.get(SHARED, 0.0) - shared
    item.stash[OWN] = item.stash.get(OWN, 0.0) + computed_since(begun) - shared


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> Generator[None, object, object]:
    shared, begun = request.config.stash.get(SHARED, 0.0), clocks()
    try:
        return (yield)
    finally:
        if fixturedef.scope != "function":
            # with the shared fixtures that it has asked for meanwhile
            request.config.stash[SHARED] = shared + computed_since(begun)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    item.stash[OWN] = 0.0
    with counted(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    with counted(item):
        result = yield
    spent = item.stash[OWN]
    if spent > LONGEST and not item.get_closest_marker("slow"):
        pytest.fail(f"it computed for {spent:.0f} s and is not marked `slow`: make it smaller, or mark it", pytrace=False)
    return result


@pytest.fixture
def triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Triton kernels read CPU tensors, in the interpreter.

    What they should have written and did not is NaN, and they may touch nothing but their arguments.
    """
    pytest.importorskip("triton", reason="the test extra installs Triton, which CPU builds of torch do not bring")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU: tests/test_gpu.py runs them there")
    import interpreter

    interpreter.read_cpu_tensors(monkeypatch)
    interpreter.poison_fresh_memory(monkeypatch)
    interpreter.refuse_other_addresses(monkeypatch)


@pytest.fixture
def run_python() -> Callable[[str], str]:
    """Run code in a fresh interpreter without the import hook, as a user's program runs; gives its output.

    Two kinds of test need it: what `import hyperattention` loads, and `torch.compile`, which cannot trace the
    checks that the hook wraps around every function.
    """

    def run(code: str) -> str:
        outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=outside)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
