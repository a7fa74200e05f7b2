"""Replace a file whole or not at all, so that an interruption costs nothing that was there."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text beside a file, and put it in the file's place once it is whole.

    Args:
        path: the file.
        text: what it is to hold.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
