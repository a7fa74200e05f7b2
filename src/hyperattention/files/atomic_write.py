"""Replace a file whole or not at all, so that an interruption costs nothing that was there."""

import os
from collections.abc import Callable
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Write a text beside a file, and put it in the file's place once it is whole.

    Args:
        path: the file.
        text: what it is to hold.
    """
    _replace(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write bytes as `atomic_write` does a text.

    Args:
        path: the file.
        data: what it is to hold.
    """
    _replace(path, lambda beside: beside.write_bytes(data))


def beside(path: Path) -> Path:
    """Name the file in which a file is written until it is whole.

    Args:
        path: the file.

    Returns:
        a name in the same folder; a link is followed, so that its target is replaced and the link stays.
    """
    real = Path(os.path.realpath(path))
    return real.with_name(f".{real.name}.{os.getpid()}")


def is_stream(path: Path) -> bool:
    """Return whether a path is a device or a pipe, such as /dev/stdout: it is written to and never replaced.

    Args:
        path: what was named.

    Returns:
        whether it is there and neither a file nor a folder.
    """
    return path.exists() and not path.is_file() and not path.is_dir()


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    if is_stream(path):
        write(path)
        return
    partial = beside(path)
    try:
        write(partial)
        os.replace(partial, os.path.realpath(path))
    finally:
        partial.unlink(missing_ok=True)
