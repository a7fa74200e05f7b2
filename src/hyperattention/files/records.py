"""Records: one JSON line a measurement, with all that is needed to take it again."""

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
    """Give the version of an installed package, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def find_commit() -> str | None:
    """Name the commit of this very source, with "+changes" where tracked files differ from it.

    Returns:
        the commit, or None where the package does not run from a git checkout.
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

    # an installed copy may lie inside a checkout of something else
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def find_processor() -> str:
    """Name the processor, as far as the platform tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def environment() -> dict[str, object]:
    """Describe where a measurement is taken: commit, versions, device and threads."""
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
    """Turn dataclasses, tuples and tensors into what JSON can hold.

    Args:
        value: anything found in a record.

    Returns:
        the same in dictionaries, lists and numbers.
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
    """Write records to a file, one a line; each carries its kind and where it was taken.

    Args:
        path: the file, which is replaced.
        records: what was measured.
        kind: what the records are of.
    """
    where = environment()
    lines = [json.dumps({"kind": kind} | {key: plain(item) for key, item in record.items()} | where) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(line + "\n" for line in lines))
