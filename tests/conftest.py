"""What every test runs under: shapes checked at run time, no network, no fight over cores."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator

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

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, which has to be asked for before they are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # the workers are the parallelism
    torch.set_num_threads(1)


# seconds that a test without the mark `slow` may compute: thrice what the mark stands for, as machines differ
LONGEST = 10.0

# files of many small models, interpreted kernels or statistics: no case is slow by itself, and all of a file are together
SLOW_FILES = frozenset(
    f"test_{name}.py"
    for name in (
        "audited_generation", "cache_file", "cache_goes_on", "cache_masks", "cache_served", "calibrate", "cli",
        "cli_evaluation", "cli_generation", "compress", "compressing_store", "cover", "error_calibration",
        "evaluation", "families", "feature_kernel", "fused", "global_defaults", "gpu_benchmark", "hyper_cache",
        "import", "paged", "pareto", "standard_error", "subgen", "subgen_store", "tolerance", "transformers",
        "transformers_use", "transforms", "triton", "triton_flat", "triton_selection",
    )
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("heavy") or item.path.name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


def computing_seconds() -> float:
    """What this thread and ended child processes have computed: waiting for a busy machine does not count."""
    spent = os.times()
    return time.thread_time() + spent.children_user + spent.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    begun = computing_seconds()
    result = yield
    spent = computing_seconds() - begun
    if spent > LONGEST and not item.get_closest_marker("slow"):
        pytest.fail(f"it computed for {spent:.0f} s and is not marked `slow`: make it smaller, or mark it", pytrace=False)
    return result


@pytest.fixture
def triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Triton kernels read CPU tensors, in the interpreter; what they should have written and did not is NaN."""
    pytest.importorskip("triton", reason="the test extra installs Triton, which CPU builds of torch do not bring")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU: tests/test_gpu.py runs them there")
    import interpreter

    interpreter.read_cpu_tensors(monkeypatch)
    interpreter.poison_fresh_memory(monkeypatch)


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
