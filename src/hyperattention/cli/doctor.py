"""The command `doctor`: what is installed, what can run here, and why the rest cannot."""

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from hyperattention.cli.support import make_console
from hyperattention.files.model_folder import WEIGHTS
from hyperattention.kernels.backend import TRITON_INSTALLED, WIDEST, capable
from hyperattention.select.score.precision import integers_are_fast

_COMPILERS = "gcc", "clang", "cc"


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Args:
        name: what.
        available: whether it can be used; None where that is no question.
        detail: its version, or why it cannot be used and what to do.
    """

    name: str
    available: bool | None
    detail: str


def doctor() -> None:
    """Say what is installed, which paths are available, and why one is not."""
    table = Table("", "what", "detail")
    table.columns[2].overflow = "fold"
    for finding in examine():
        mark = {None: Text(""), True: Text("yes", "green"), False: Text("no", "red")}[finding.available]
        table.add_row(mark, finding.name, finding.detail)
    make_console().print(table)


def examine() -> tuple[Finding, ...]:
    """Look at versions, devices and paths; nothing is imported that is not needed, and nothing is run.

    Returns:
        the findings, in the order to print them.
    """
    return (
        Finding("hyperattention", None, _version("hyperattention") or "run from source, not installed"),
        Finding("python", None, f"{platform.python_version()} on {platform.platform()}"),
        Finding("torch", None, torch.__version__),
        Finding("cpu", True, f"{os.cpu_count()} cores, {torch.get_num_threads()} threads (OMP_NUM_THREADS; {_waiting()})"),
        _integers(),
        *_devices(),
        *_kernels(),
        _package("transformers", "models cannot be switched: pip install 'hyperattention[transformers]'"),
        _package("safetensors", "the reference model cannot be read: pip install 'hyperattention[transformers]'"),
        _package("matplotlib", "no plots: pip install 'hyperattention[cli]'"),
        _package("rich", "no tables: pip install 'hyperattention[cli]'"),
        _file("reference model", WEIGHTS / "model.safetensors", "train one with training/train_reference.py"),
        _file("held-out text", WEIGHTS.parent / "held_out.txt", "write it with training/write_held_out.py"),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str, remedy: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, False, f"not installed; {remedy}")
    return Finding(name, True, _version(name) or "installed, version unknown")


def _file(name: str, path: Path, remedy: str) -> Finding:
    if not path.exists():
        return Finding(name, False, f"{path} is missing: reinstall, or {remedy}")
    return Finding(name, True, f"{path.stat().st_size / 1e6:.1f} MB")


def _waiting() -> str:
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return "waiting threads sleep"
    return "waiting threads spin: set OMP_WAIT_POLICY=passive where other programs use the cores"


def _integers() -> Finding:
    fast = integers_are_fast(torch.empty(0, dtype=torch.float32, device="cpu"))
    return Finding(
        "8-bit products", fast, "fast: keys are scanned in them" if fast else "slow: keys are scanned in wider numbers"
    )


def _devices() -> tuple[Finding, ...]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "no device found; check the driver" if built else "torch is built for CPUs; install a CUDA build"
        return (Finding("cuda", False, reason),)
    names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return tuple(Finding(f"cuda:{i}", True, name) for i, name in enumerate(names))


def _kernels() -> tuple[Finding, ...]:
    name, found = "list kernel, Triton", f"Triton {_version('triton') or _version('pytorch-triton') or 'of unknown version'}"
    if not TRITON_INSTALLED:
        triton = Finding(name, False, "Triton is not installed: CUDA tensors take the PyTorch kernel; pip install triton")
    elif not torch.cuda.is_available():
        triton = Finding(name, False, f"{found} has no device to run on; CPU tensors take the PyTorch kernel")
    elif not any(map(capable, range(torch.cuda.device_count()))):
        triton = Finding(name, False, f"{found} needs compute capability 8.0; older devices take the PyTorch kernel")
    elif not any(map(shutil.which, _COMPILERS)) and not os.environ.get("CC"):
        triton = Finding(name, False, f"{found} builds launchers with a C compiler, and finds none: install gcc, or set CC")
    else:
        triton = Finding(name, True, f"{found}: CUDA tensors of 16 or 32 bits, up to {WIDEST} wide")
    # the same machines run it, for fewer calls
    why = "decoding without gradients, up to 64 rows of a group; otherwise PyTorch" if triton.available else triton.detail
    decoding = replace(triton, name="decoding kernel, Triton", detail=why)
    return (Finding("list kernel, PyTorch", True, "any device and dtype"), triton, decoding)
