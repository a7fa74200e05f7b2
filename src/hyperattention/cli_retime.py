"""The command that times a plan again."""

from pathlib import Path
from typing import Annotated

import typer

from hyperattention.cli.support import check_writable, explained, make_console


def retime(
    plan: Annotated[Path, typer.Argument(help="The plan that `calibrate` wrote.")],
    model: Annotated[str, typer.Argument(help="The plan's model: a folder, or 'reference'.")] = "reference",
    text: Annotated[Path | None, typer.Argument(help="Text as in `calibrate`; the held-out one if omitted.")] = None,
    out: Annotated[Path | None, typer.Option(help="The plan to write; by default in place of the old one.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the document.")] = 0,
) -> None:
    """Time a plan again on this machine: its methods and errors stay, and from where it pays is measured anew."""
    console = make_console()
    with explained():
        from transformers.utils import logging

        from hyperattention.report import retime as report
        from hyperattention.report.calibrate import find_folder
        from hyperattention.report.demo import Options as Texts

        logging.disable_progress_bar()
        written = plan if out is None else out
        check_writable(written)
        found = report.ready(plan, Texts(text=text, model=find_folder(model), seed=seed))
        timed = report.run(found, written, console)
    report.show(found.plan, timed, console)
    console.print(f"wrote {written}", markup=False)
