"""The commands `calibrate` and `inspect`: a method for each head of a model, and what every head does."""

from pathlib import Path
from typing import Annotated

import typer

from hyperattention.cli.options import Encoding, Length, Overwrite, Seed
from hyperattention.cli.support import check_inputs, explained, hide_bars, make_console, tell
from hyperattention.files.model_folder import find_folder
from hyperattention.files.outputs import Outputs

_Model = Annotated[str, typer.Argument(help="Folder of a transformers model, or 'reference': the embedded one.")]
_Text = Annotated[Path | None, typer.Argument(help="Text like what the model will read; the held-out one if omitted.")]
_PAGE = Path("hyperattention-inspect.html")


def calibrate_model(
    model: _Model = "reference",
    text: _Text = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest mean relative error of any head, on these documents.", show_default="0.05")
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(help="In place of a tolerance: keys that a query may list on average, spent where they matter most."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The plan to write.")] = Path("plan.json"),
    length: Length = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents read; the worst decides.")] = 2,
    seed: Seed = 0,
    encoding: Encoding = None,
    overwrite: Overwrite = False,
) -> None:
    """Choose a method for each layer and head of a model, by error and time measured here; resumed if interrupted."""
    console = make_console()
    with explained():
        Outputs((out,), overwrite, (text, find_folder(model))).check()
        check_inputs(model=model, text=text, encoding=encoding)
        from hyperattention.calibration.settings import CalibrationSettings

        settings = CalibrationSettings(tolerance, seed, pairs=pairs)  # refused before transformers is imported
        from hyperattention.report import calibrate as report
        from hyperattention.report.demo import DemoOptions

        hide_bars()
        texts = DemoOptions(length, text, find_folder(model), documents=documents, seed=seed, encoding=encoding)
        options = report.CalibrateOptions(out, texts, settings, overwrite)
        prepared = report.ready(options)
        plan = report.run(prepared, options, console)
    report.show(plan, console)
    console.print(f"wrote {out}: apply it with `use(model, load_plan({str(out)!r}))`")


def inspect_model(
    model: _Model = "reference",
    text: _Text = None,
    out: Annotated[Path, typer.Option(help="The page to write; an earlier one under the default name is replaced.")] = _PAGE,
    plan: Annotated[Path | None, typer.Option(help="Show what this plan chose; by default the default method.")] = None,
    length: Length = None,
    seed: Seed = 0,
    encoding: Encoding = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw where every head looks, what serves it and what that costs, as one page that needs no network."""
    console = make_console()
    outputs = Outputs((out,), overwrite, (text, plan, find_folder(model)), _PAGE)
    with explained():
        outputs.check()
        check_inputs(model=model, text=text, encoding=encoding, plan=plan)
        from hyperattention.report import inspect as report
        from hyperattention.report.demo import DemoOptions

        hide_bars()
        texts = DemoOptions(length, text, find_folder(model), documents=1, seed=seed, encoding=encoding)
        prepared = report.ready(report.InspectOptions(plan, texts))
        layers = report.run(prepared, console)
        outputs.check()
        report.save(prepared, layers, out)
    tell(outputs)
