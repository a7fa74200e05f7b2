"""A text file named by the user: unchanged bytes for byte-level models, decoded characters for all others."""

from dataclasses import dataclass
from pathlib import Path

# first bytes of files in other encodings
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@dataclass(frozen=True)
class Text:
    """A text.

    Args:
        data: the bytes of the file; re-encoded as UTF-8 if the user named another encoding.
        source: origin of the text, for messages.
    """

    data: bytes
    source: str

    def words(self) -> str:
        """Decode the text; invalid UTF-8 raises a ValueError that names the position and the remedy.

        Returns:
            the characters.
        """
        return decoded(self.data, "utf-8", self.source)


def read_text(path: Path, encoding: str | None = None) -> Text:
    """Read a text.

    Args:
        path: the file.
        encoding: encoding given by the user; None for UTF-8, or for bytes that a byte-level model reads unchanged.

    Returns:
        the text.

    Raises:
        ValueError: if the file cannot be read, or is not in that encoding.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; name a readable text file") from error
    return Text(data if encoding is None else decoded(data, encoding, str(path)).encode(), str(path))


def decoded(data: bytes, encoding: str, source: str) -> str:
    """Decode bytes without replacement characters.

    Args:
        data: the bytes.
        encoding: their encoding.
        source: origin of the bytes, for messages.

    Returns:
        the characters.

    Raises:
        ValueError: if a byte is invalid, or the encoding is unknown; the message names it.
    """
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        marked = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
        guess = f"it begins as {marked} does: give --encoding {marked}" if marked else _REMEDY
        raise ValueError(
            f"{source} is not {encoding}: byte {data[error.start]:#04x} at position {error.start:,} is no part of a "
            f"character; {guess}"
        ) from error
    except LookupError as error:
        raise ValueError(f"{error}: give an encoding that Python supports, such as utf-8, latin-1 or utf-16") from error


def refuse_damaged(words: str, source: str) -> None:
    """Raise ValueError for command-line words that were not valid UTF-8, for a model that cannot read bytes.

    Args:
        words: the words.
        source: name of the argument, for messages.
    """
    decoded(words.encode("utf-8", "surrogateescape"), "utf-8", source)


_REMEDY = "save it as UTF-8, or name its encoding with --encoding, such as latin-1"
