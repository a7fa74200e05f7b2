"""Replace a file whole or not at all, so that an interruption costs nothing that was there."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text beside a file, and put it in the file's place once it is whole.

    Args:
        path: the file.
        text: what it is to hold.
    """
    _replace(path, lambda beside: beside.write_text(text))


def write_whole_bytes(path: Path, data: bytes) -> None:
    """Write bytes as `write_whole` does a text.

    Args:
        path: the file.
        data: what it is to hold.
    """
    _replace(path, lambda beside: beside.write_bytes(data))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
