"""The texts that training reads, and the rule by which whole files are held out: the hash of their names."""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# tests and tables teach little, and site-packages are given as folders of their own
SKIPPED = {"test", "tests", "site-packages", "encodings", "pydoc_data", "idle_test", "__pycache__", "lib2to3"}
LEAST_BYTES = 512


@dataclass(frozen=True)
class Source:
    """The texts of one folder: those for training, and by name those that are held out."""

    name: str
    train: tuple[bytes, ...]
    kept: tuple[tuple[str, bytes], ...]


def held_out(path: Path) -> bool:
    """Whole files are held out, chosen by their name alone, so that a copy in another package is held out as well."""
    return hashlib.sha256(path.name.encode()).digest()[0] < 20


def read_source(root: Path, name: str) -> Source:
    """Read all Python files under a folder, without tests and tables."""
    files = list(_files(root))
    train = tuple(data for path, data in files if not held_out(path))
    if not train:
        raise SystemExit(f"{root} has no Python files of {LEAST_BYTES} bytes for training: name a folder of source code")
    return Source(name, train, tuple((str(path.relative_to(root)), data) for path, data in files if held_out(path)))


def _files(root: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(root.rglob("*.py")):
        if path.is_file() and not SKIPPED & set(path.relative_to(root).parts):
            data = path.read_bytes()
            if len(data) >= LEAST_BYTES:
                yield path, data


def standard_library() -> Source:
    """Read the standard library of the Python that runs."""
    return read_source(Path(sysconfig.get_paths()["stdlib"]), "the standard library")


def corpus(folders: Sequence[Path] = ()) -> tuple[Source, ...]:
    """Read the standard library and further folders of source code."""
    return (standard_library(), *(read_source(folder, folder.resolve().name) for folder in folders))
