"""The rule for files that are written: what is there already stays, unless the user says otherwise."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hyperattention.files.atomic_write import beside, is_stream

# matplotlib and HTML pages carry it, so that a command knows its own picture or page again
MARK = "written by hyperattention"
# where the mark stands, if it is there
_BEGINNING = 4096


def refuse_existing(path: Path, remedy: str) -> None:
    """Refuse to write over a file.

    Args:
        path: the file that is to be written.
        remedy: how the user asks for it to be replaced.

    Raises:
        FileExistsError: if something is there.
    """
    if os.path.lexists(path) and not is_stream(path):
        raise FileExistsError(f"{path} exists: name another file, or give {remedy}")


def carries_mark(path: Path) -> bool:
    """Return whether a picture or a page was written by this package.

    Args:
        path: the file.

    Returns:
        whether it was; no if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(_BEGINNING)
    except OSError:
        return False


def check_folder(path: Path) -> None:
    """Refuse a file or folder that cannot be made where it is to be, by making a file there.

    Args:
        path: what is going to be made.

    Raises:
        ValueError: if the folder is not there, or refuses the file.
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
    """The files that a command is going to write, and the rule for them.

    Args:
        files: the files; None for none.
        overwrite: whether the user allows files that are there to be replaced.
        reads: files and folders that the command reads, which are never written over; None for none.
        default: the name that a file has if the user gives none; what this package wrote under it is replaced.
    """

    files: tuple[Path | None, ...]
    overwrite: bool = False
    reads: tuple[Path | None, ...] = ()
    default: Path | None = None

    @property
    def named(self) -> list[Path]:
        """The files without those that are not wanted."""
        return [path for path in self.files if path is not None]

    def check(self) -> None:
        """Refuse what would be lost and what cannot be written: before work begins, and again before files are written.

        A file that is there and not to be replaced is a FileExistsError.

        Raises:
            ValueError: if a file cannot be written, is one of those that are read, or is named twice.
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
    """Refuse a folder in which files have to be written over that are of something else, whatever the user allows.

    Args:
        folder: the folder; it may not be there yet.
        names: of the files that are going to be written.
        is_own: whether a file that is there was written by the same command.
        maker: the command, as the user knows it.

    Raises:
        FileExistsError: naming the first file that is not its own.
    """
    for name in names:
        path = folder / name
        if os.path.lexists(path) and not is_own(path):
            raise FileExistsError(f"{path} exists and was not written by `{maker}`: name another folder")
