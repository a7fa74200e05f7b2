"""The command `pareto`: all methods over budgets."""

from pathlib import Path
from typing import Annotated

import typer

from hyperattention.cli.options import Encoding, Json, Length, Model, Overwrite, Plot, Quick, Reference, Repeats, Seed, Text
from hyperattention.cli.support import (
    check_inputs,
    check_picture,
    explained,
    hide_bars,
    make_console,
    names,
    numbers,
    tell,
)
from hyperattention.files.outputs import Outputs

_PICTURE = Path("hyperattention-pareto.png")


def pareto(
    length: Length = None,
    text: Text = None,
    model: Model = None,
    reference: Reference = None,
    budgets: Annotated[str | None, typer.Option(help="Keys listed a query, with commas between (512,1024,2048).")] = None,
    methods: Annotated[str | None, typer.Option(help="Names of methods, with commas between; all by default.")] = None,
    repeats: Repeats = None,
    loss: Annotated[bool, typer.Option(help="Also run the model with every method in all its layers.")] = True,
    plot: Plot = _PICTURE,
    json: Json = None,
    quick: Quick = False,
    seed: Seed = 0,
    encoding: Encoding = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare all methods over budgets: time, error by head, loss and retrieval; which are on the Pareto front."""
    console = make_console()
    outputs = Outputs((plot, json), overwrite, (text, model, reference), _PICTURE)
    with explained():
        outputs.check()
        check_picture(plot)
        check_inputs(model=model, reference=reference, text=text, encoding=encoding)
        given_budgets = numbers("--budgets", budgets or ("512,768" if quick else "512,1024,2048"))
        from hyperattention.bench.candidates import candidates

        candidates(given_budgets, names(methods))  # refuses unknown methods, and budgets that are too small
        from hyperattention.bench.frontier import MeasureSettings
        from hyperattention.report import demo
        from hyperattention.report import pareto as report

        hide_bars()
        usual, own = demo.DemoOptions(), model is not None or reference is not None
        length = length or (2048 if quick and not own else None)
        inputs = demo.DemoOptions(
            length,
            text,
            model,
            reference or usual.reference,
            documents=1 if quick else None,
            seed=seed,
            encoding=encoding,
        )
        options = report.ParetoOptions(
            inputs,
            given_budgets,
            names(methods),
            MeasureSettings(64, repeats or 1, 1) if quick else MeasureSettings(repeats=repeats or 3),
            loss=loss,
        )
        prepared = report.prepare(options)
    results = report.run(prepared, console)
    report.show(prepared, results, console)
    with explained():
        outputs.check()
        report.save(prepared, results, plot=plot, records=json)
    tell(outputs)
