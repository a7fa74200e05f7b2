"""What all commands share: one line for what a user can put right, and a console of a width that tables fit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Never

import typer
from rich.console import Console

_EXTRAS = frozenset({"matplotlib", "numpy", "plotly", "rich", "safetensors", "transformers", "typer"})
# what shells give for a program that an interruption ended
INTERRUPTED = 130
# a file or a pipe has no width; tables need this much
_PLAIN_WIDTH = 150


def refuse(message: object) -> Never:
    """End the command with a line that says why.

    Args:
        message: the line.

    Raises:
        Exit: with status 2.
    """
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


@contextmanager
def explained() -> Iterator[None]:
    """Turn what a user can put right into one line; anything else keeps its traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRAS:
            raise
        refuse(f"this command needs {error.name}: pip install 'hyperattention[demo]'")
    except (ValueError, OSError) as error:
        refuse(error)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(INTERRUPTED) from None


def make_console(*, stderr: bool = False) -> Console:
    """Give the console to print on.

    Args:
        stderr: whether it is that of errors, where standard output is for what a model writes.

    Returns:
        the console.
    """
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH, stderr=stderr)


def check_writable(*paths: Path | None) -> None:
    """Refuse files that cannot be written.

    Args:
        paths: the files; None for none.

    Raises:
        ValueError: naming the first.
    """
    for path in paths:
        if path is None:
            continue
        folder = path.resolve().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"cannot write {path}: name a file in an existing directory that you may write to")


def names(text: str | None) -> tuple[str, ...] | None:
    """Read names such as "uniform,streaming".

    Args:
        text: names with commas between them; None for none given.

    Returns:
        the names.
    """
    return None if text is None else tuple(name for word in text.split(",") if (name := word.strip()))


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Read numbers such as "512,1024".

    Args:
        option: what they are of, as the user knows it.
        text: numbers with commas between them.

    Returns:
        the numbers, each once.

    Raises:
        ValueError: if one is no positive whole number.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"{option} {text!r}: give whole, positive numbers with commas between, such as 512,1024")
    return tuple(dict.fromkeys(int(word) for word in words))
