"""What all commands share: one line for an error that the user can correct, and a console wide enough for tables."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import metadata
from pathlib import Path
from typing import Never

import typer
from rich.console import Console

from hyperattention.files.model_folder import check_model_folder, check_reference_folder, find_folder
from hyperattention.files.outputs import Outputs
from hyperattention.files.plan_file import load_plan
from hyperattention.files.user_text import read_text

_EXTRAS = frozenset({"matplotlib", "numpy", "plotly", "rich", "safetensors", "transformers", "typer"})
# the exit status that shells give for a program that was interrupted
INTERRUPTED = 130
# the exit status for a program whose output pipe was closed
_PIPE_CLOSED = 141
# a name without an ending gives a PNG
_PICTURES = frozenset({"", ".jpeg", ".jpg", ".pdf", ".png", ".svg", ".webp"})
# a file or a pipe has no width, unless COLUMNS says one; tables need this much
_PLAIN_WIDTH = 150


def version(wanted: bool) -> bool:
    """Print the version and end the program, if the user asked for it.

    Args:
        wanted: whether the user asked for it.

    Returns:
        the argument.

    Raises:
        Exit: after the version is printed.
    """
    if wanted:
        try:
            typer.echo(f"hyperattention {metadata.version('hyperattention')}")
        except metadata.PackageNotFoundError:
            typer.echo("hyperattention, run from source and not installed")
        raise typer.Exit
    return wanted


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
def quiet_end() -> Iterator[None]:
    """End a command without a traceback if it is interrupted, or if the pipe that it writes to was closed."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # what is left in the buffer would fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(_PIPE_CLOSED) from None
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(INTERRUPTED) from None


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that an interruption or a closed pipe ends it without a traceback.

    Args:
        command: the function of the command.

    Returns:
        the wrapped function.
    """

    @wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        with quiet_end():
            command(*args, **kwargs)

    return run


@contextmanager
def explained() -> Iterator[None]:
    """Turn an error that the user can correct into one line; any other error keeps its traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRAS:
            raise
        refuse(f"this command needs {error.name}: pip install 'hyperattention[demo]'")
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        refuse(error)


def make_console(*, stderr: bool = False) -> Console:
    """Make the console to print on. It prints brackets and colons unchanged, as names of files may contain them.

    Args:
        stderr: whether it prints to standard error, for commands whose standard output is the text of a model.

    Returns:
        the console.
    """
    console = Console(stderr=stderr, markup=False, emoji=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(width=_PLAIN_WIDTH, stderr=stderr, markup=False, emoji=False)


def check_inputs(
    *,
    model: str | Path | None = None,
    reference: Path | None = None,
    text: Path | None = None,
    encoding: str | None = None,
    plan: Path | None = None,
) -> None:
    """Refuse inputs that are missing or damaged, before any slow package is imported.

    Args:
        model: a folder, or the word for the embedded model; None for none.
        reference: folder of a reference model; None for none.
        text: the file of a text; None for none.
        encoding: the encoding of the text, if the user gave one.
        plan: the file of a plan; None for none.

    Raises:
        ValueError: if there is an encoding and no text.
    """
    if plan is not None:
        load_plan(plan)
    folder = None if model is None else find_folder(str(model))
    if folder is not None:
        check_model_folder(folder)
    if reference is not None:
        check_reference_folder(reference)
    if text is not None:
        found = read_text(text, encoding)
        if folder is not None:
            found.words()
    elif encoding is not None:
        raise ValueError(f"--encoding {encoding} is of your own text: name the text as well")


def check_picture(path: Path | None) -> None:
    """Refuse a picture file whose format cannot be written.

    Args:
        path: the file; None for none.

    Raises:
        ValueError: if the ending of its name is not one of the known formats.
    """
    if path is not None and path.suffix.lower() not in _PICTURES:
        raise ValueError(f"cannot draw {path}: end its name in {', '.join(sorted(_PICTURES - {''}))}")


def tell(outputs: Outputs) -> None:
    """Print which files were written, one line each.

    Args:
        outputs: the files.
    """
    for path in outputs.named:
        typer.echo(f"wrote {path}")


def hide_bars() -> None:
    """Turn off the progress bars that transformers shows while it loads a model."""
    from transformers.utils import logging

    logging.disable_progress_bar()


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
        option: the name of the option, for the error message.
        text: numbers with commas between them.

    Returns:
        the numbers, without repeats.

    Raises:
        ValueError: if one of them is not a positive whole number.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"{option} {text!r}: give whole, positive numbers with commas between, such as 512,1024")
    return tuple(dict.fromkeys(int(word) for word in words))
