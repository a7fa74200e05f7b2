"""Progress of a measurement with the time left: a bar on a terminal, occasional lines in a file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# a file gets a line for every twentieth of the steps, and for a step that begins this many seconds after the last line
_LINES, _SECONDS = 20, 30.0

Announce = Callable[[str], None]


@contextmanager
def progress(console: Console, title: str, steps: int, clock: Callable[[], float] = time.monotonic) -> Iterator[Announce]:
    """Show the progress of a measurement.

    Args:
        console: the console to print to.
        title: the title of the measurement.
        steps: total number of steps.
        clock: a function that returns seconds, for the lines of a file.

    Yields:
        a function to call before each step, with the name of the step.
    """
    live = console.is_terminal or console.is_jupyter
    with _bar(console, title, steps) if live else _lines(console, title, steps, clock) as on_step:
        yield on_step


@contextmanager
def _bar(console: Console, title: str, steps: int) -> Iterator[Announce]:
    what, step = (TextColumn(text, markup=False) for text in ("{task.fields[title]}", "{task.description}"))
    columns = (SpinnerColumn(), what, BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), step)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=steps, title=title)
        # the bar counts finished steps, so the first call does not advance it
        done = iter(range(steps + 1))

        def on_step(name: str) -> None:
            bar.update(task, completed=next(done, steps), description=name)

        yield on_step


@contextmanager
def _lines(console: Console, title: str, steps: int, clock: Callable[[], float]) -> Iterator[Announce]:
    """Print complete lines, because a file cannot show a moving bar."""
    begun, done, last, line_at = clock(), 0, -steps, 0.0

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_step(name: str) -> None:
        nonlocal done, last, line_at
        now = clock()
        if (done - last) * _LINES >= steps or now - line_at >= _SECONDS:
            spent = now - begun
            left = f", about {_minutes(spent * (steps - done) / done)} left" if 0 < done < steps else ""
            say(f"{title}: {min(done, steps)} of {steps} done in {_minutes(spent)}{left}; next: {name}")
            last, line_at = done, now
        done += 1

    yield on_step
    say(f"{title}: finished in {_minutes(clock() - begun)}")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
