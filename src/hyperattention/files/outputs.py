"""The rule for output files: an existing file is kept, unless the user allows overwriting."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hyperattention.files.atomic_write import beside, is_stream

# pictures and HTML pages contain this mark, so that a command recognises its own files
MARK = "written by hyperattention"
# the part of a file that is searched for the mark
_BEGINNING = 4096


def refuse_existing(path: Path, remedy: str) -> None:
    """Refuse to overwrite an existing file.

    Args:
        path: the output file.
        remedy: the option with which the user allows overwriting.

    Raises:
        FileExistsError: if the path exists.
    """
    if os.path.lexists(path) and not is_stream(path):
        raise FileExistsError(f"{path} exists: name another file, or give {remedy}")


def carries_mark(path: Path) -> bool:
    """Return whether a picture or a page was written by this package.

    Args:
        path: the file.

    Returns:
        whether it was; False if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(_BEGINNING)
    except OSError:
        return False


def check_folder(path: Path) -> None:
    """Check that a file or folder can be created, by creating a temporary file in the same folder.

    Args:
        path: the future file or folder.

    Raises:
        ValueError: if the folder does not exist, or the file cannot be created in it.
    """
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {folder}; make it, or name a file in another folder")
    attempt = beside(path)
    try:
        attempt.touch(exist_ok=False)
        attempt.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; name a file in a folder that you may write to"
        ) from error


@dataclass(frozen=True)
class Outputs:
    """The files that a command will write, and their rule.

    Args:
        files: the files; None for a file that is not wanted.
        overwrite: whether the user allows existing files to be replaced.
        reads: files and folders that the command reads, which are never overwritten; None for none.
        default: default file name; a file of this name is replaced if this package wrote it.
    """

    files: tuple[Path | None, ...]
    overwrite: bool = False
    reads: tuple[Path | None, ...] = ()
    default: Path | None = None

    @property
    def named(self) -> list[Path]:
        """The files that are wanted."""
        return [path for path in self.files if path is not None]

    def check(self) -> None:
        """Check the output files, before work begins and again before they are written.

        An existing file that must not be replaced raises FileExistsError.

        Raises:
            ValueError: if a file cannot be written, is also read by the command, or is named twice.
        """
        seen: set[str] = set()
        for path in self.named:
            if path.is_dir():
                raise ValueError(f"cannot write {path}: it is a folder; name a file")
            if is_stream(path):
                continue
            if any(_is_same(path, other) for other in self.reads if other is not None):
                raise ValueError(f"cannot write {path}: this command reads it; name another file")
            if (real := os.path.realpath(path)) in seen:
                raise ValueError(f"cannot write {path} twice: give each output a name of its own")
            seen.add(real)
            if not self.overwrite and not (path == self.default and carries_mark(path)):
                refuse_existing(path, "--overwrite")
            check_folder(path)


def _is_same(path: Path, other: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other) or (path.exists() and other.exists() and path.samefile(other))


def check_own(folder: Path, names: Iterable[str], is_own: Callable[[Path], bool], maker: str) -> None:
    """Refuse a folder in which foreign files would be overwritten, even if the user allows overwriting.

    Args:
        folder: the folder; it may not exist yet.
        names: names of the files that will be written.
        is_own: whether an existing file was written by the same command.
        maker: the command, for the error.

    Raises:
        FileExistsError: if a file was not written by the command; the message names the first one.
    """
    for name in names:
        path = folder / name
        if os.path.lexists(path) and not is_own(path):
            raise FileExistsError(f"{path} exists and was not written by `{maker}`: name another folder")
