"""What every test runs under: shapes checked at run time, no network, no fight over cores."""

import os
import subprocess
import sys
from collections.abc import Callable

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


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
