"""The command that times a plan again."""

from pathlib import Path
from typing import Annotated

import typer

from hyperattention.cli.options import Encoding, Overwrite, Seed
from hyperattention.cli.support import check_inputs, explained, hide_bars, make_console
from hyperattention.files.model_folder import find_folder
from hyperattention.files.outputs import Outputs


def retime(
    plan: Annotated[Path, typer.Argument(help="The plan that `calibrate` wrote.")],
    model: Annotated[str, typer.Argument(help="The plan's model: a folder, or 'reference'.")] = "reference",
    text: Annotated[Path | None, typer.Argument(help="Text as in `calibrate`; the held-out one if omitted.")] = None,
    out: Annotated[Path | None, typer.Option(help="The plan to write; without it the old one, with --overwrite.")] = None,
    seed: Seed = 0,
    encoding: Encoding = None,
    overwrite: Overwrite = False,
) -> None:
    """Time a plan again on this machine. Its methods and errors stay; the length from which it is faster may change."""
    console = make_console()
    written = plan if out is None else out
    with explained():
        Outputs((written,), overwrite, (text, find_folder(model))).check()
        check_inputs(model=model, text=text, encoding=encoding, plan=plan)
        from hyperattention.report import retime as report
        from hyperattention.report.demo import DemoOptions

        hide_bars()
        found = report.ready(plan, DemoOptions(text=text, model=find_folder(model), seed=seed, encoding=encoding))
        timed = report.run(found, written, console, overwrite=overwrite)
    report.show(found.plan, timed, console)
    console.print(f"wrote {written}")
