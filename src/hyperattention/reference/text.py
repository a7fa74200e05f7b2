"""Documents for the evaluation of models, cut from the packaged held-out text or from a user's text."""

import random
from pathlib import Path

from hyperattention.reference.documents import Document, make_document

HELD_OUT = Path(__file__).parent / "held_out.txt"
_BYTES_PER_PAIR = 128


def held_out_text() -> bytes:
    """Read the held-out files, joined by empty lines.

    Returns:
        about half a megabyte of Python source code that was not used in training.

    Raises:
        FileNotFoundError: if the file is missing from the package.
    """
    if not HELD_OUT.exists():
        raise FileNotFoundError(f"{HELD_OUT} is missing: reinstall the package, or write it with training/write_held_out.py")
    return HELD_OUT.read_bytes().replace(b"\f", b"\n")


def documents_from(text: bytes, length: int, count: int, seed: int) -> tuple[Document, ...]:
    """Cut documents that do not overlap from a text, and insert facts and questions in each.

    Args:
        text: ordinary text.
        length: bytes of each document.
        count: number of documents; a short text gives fewer.
        seed: seed of the choice of pieces, and of keys, digits and places.

    Returns:
        at least one document, with a set line and a get line for about every 128 bytes.

    Raises:
        ValueError: if `length` or `count` is not positive, or the text is shorter than one document.
    """
    if length < 1 or count < 1:
        raise ValueError(f"length={length} and count={count}: give positive numbers")
    starts = range(0, len(text) - length + 1, length)
    if not starts:
        raise ValueError(f"the text has {len(text)} bytes, but one document needs {length}: give a longer text")
    rng = random.Random(seed)
    chosen = sorted(rng.sample(starts, min(count, len(starts))))
    num_pairs = max(1, length // _BYTES_PER_PAIR)
    return tuple(make_document(text[start : start + length], length, num_pairs, rng) for start in chosen)


def held_out_documents(length: int, count: int, seed: int = 0) -> tuple[Document, ...]:
    """Cut documents from the packaged held-out text; arguments, result and errors are those of `documents_from`."""
    return documents_from(held_out_text(), length, count, seed)
