"""A text that a user names: its bytes as they are for models of bytes, its words for all others, and nothing replaced."""

from dataclasses import dataclass
from pathlib import Path

# how files of other encodings begin
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@dataclass(frozen=True)
class Text:
    """A text.

    Args:
        data: its bytes, as they are in the file; UTF-8 if the user named another encoding.
        source: where it is from, for messages.
    """

    data: bytes
    source: str

    def words(self) -> str:
        """Decode the text; what is no UTF-8 is a ValueError that says where, and what to do.

        Returns:
            its characters.
        """
        return decoded(self.data, "utf-8", self.source)


def read_text(path: Path, encoding: str | None = None) -> Text:
    """Read a text.

    Args:
        path: the file.
        encoding: what the user says that it is in; None for UTF-8, or bytes that a model of bytes takes as they are.

    Returns:
        the text.

    Raises:
        ValueError: if it cannot be read, or not in that encoding.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; name a readable text file") from error
    return Text(data if encoding is None else decoded(data, encoding, str(path)).encode(), str(path))


def decoded(data: bytes, encoding: str, source: str) -> str:
    """Decode bytes, every one of them.

    Args:
        data: the bytes.
        encoding: what they are in.
        source: where they are from, for messages.

    Returns:
        the characters.

    Raises:
        ValueError: naming the first byte that is none, or an encoding that there is not.
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
        raise ValueError(f"{error}: give one that Python knows, such as utf-8, latin-1 or utf-16") from error


def refuse_damaged(words: str, source: str) -> None:
    """Refuse words of the command line that were no UTF-8 there, where a model cannot take them as bytes: a ValueError.

    Args:
        words: the words.
        source: what they are, for messages.
    """
    decoded(words.encode("utf-8", "surrogateescape"), "utf-8", source)


_REMEDY = "save it as UTF-8, or say what it is in with --encoding, such as latin-1"
