"""A bar that says what is being measured, with the time left."""

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


@contextmanager
def progress(console: Console, title: str, steps: int) -> Iterator[Callable[[str], None]]:
    """Show a bar while measurements run.

    Args:
        console: where to.
        title: what is measured.
        steps: steps in all.

    Yields:
        a function to call before each step, with what comes next.
    """
    what, step = (TextColumn(text, markup=False) for text in ("{task.fields[title]}", "{task.description}"))
    columns = (SpinnerColumn(), what, BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), step)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=steps, title=title)
        # the bar counts steps that are done, so the first announcement moves nothing
        done = iter(range(steps + 1))

        def on_step(name: str) -> None:
            bar.update(task, completed=next(done, steps), description=name)

        yield on_step
