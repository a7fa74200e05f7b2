"""Replace a file completely or not at all, so that an interruption does not damage the old file."""

import os
from collections.abc import Callable
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Write a text to a temporary file in the same folder, then replace the file with it.

    Args:
        path: the file.
        text: the new content.
    """
    _replace(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write bytes as `atomic_write` writes a text.

    Args:
        path: the file.
        data: the new content.
    """
    _replace(path, lambda beside: beside.write_bytes(data))


def beside(path: Path) -> Path:
    """Return the name of the temporary file for a file.

    Args:
        path: the file.

    Returns:
        a name in the same folder; a link is followed, so that its target is replaced and the link stays.
    """
    real = Path(os.path.realpath(path))
    return real.with_name(f".{real.name}.{os.getpid()}")


def is_stream(path: Path) -> bool:
    """Return whether a path is a device or a pipe, such as /dev/stdout, which is written to and never replaced.

    Args:
        path: the path.

    Returns:
        whether it exists and is neither a file nor a folder.
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
