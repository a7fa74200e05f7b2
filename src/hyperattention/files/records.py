"""Records: one JSON line per measurement, with all data needed to repeat it."""

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path

import torch

from hyperattention.files.atomic_write import atomic_write

PACKAGES = ("hyperattention", "torch", "transformers", "numpy", "triton")


def find_version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def find_commit() -> str | None:
    """Return the commit of the running source, with "+changes" if tracked files differ from it.

    The records of `benchmarks/records` do not count: a measurement writes them, and they change nothing that is measured.

    Returns:
        the commit, or None if the package does not run from a git checkout.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # an installed copy may be inside the checkout of another project
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    commit, but_records = git("rev-parse", "HEAD"), (":(top)", ":(top,exclude)benchmarks/records")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *but_records)
    return f"{commit}+changes" if commit and changed else commit


def find_processor() -> str:
    """Return the name of the processor, if the platform reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def environment() -> dict[str, object]:
    """Return the environment of a measurement: commit, versions, device and threads."""
    return {
        "commit": find_commit(),
        "versions": {"python": platform.python_version()} | {name: find_version(name) for name in PACKAGES},
        "platform": f"{sys.platform} {platform.machine()}",
        "device": f"cpu: {find_processor()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def plain(value: object) -> object:
    """Convert dataclasses, tuples and tensors to JSON values.

    Args:
        value: any value of a record.

    Returns:
        the value as dictionaries, lists and numbers.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def write_records(path: Path, records: Iterable[Mapping[str, object]], *, kind: str) -> None:
    """Write records to a file, one per line, each with its kind and the environment of the measurement.

    Args:
        path: the file, which is replaced.
        records: the measurements.
        kind: kind of the records.
    """
    where = environment()
    lines = [json.dumps({"kind": kind} | {key: plain(item) for key, item in record.items()} | where) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(line + "\n" for line in lines))
