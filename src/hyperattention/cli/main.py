"""The command line: parse, call, print."""

from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.table import Table
    from rich.text import Text as Styled
except ModuleNotFoundError as error:
    # before typer there is nothing to report an error with
    raise SystemExit(f"the command line needs {error.name}: pip install 'hyperattention[demo]'") from error

from hyperattention.cli.evaluate import evaluate
from hyperattention.cli.generate import ask, cache, generate
from hyperattention.cli.plan import calibrate_model, inspect_model
from hyperattention.cli.retime import retime
from hyperattention.cli.support import (
    Encoding,
    Length,
    Overwrite,
    Seed,
    check_inputs,
    check_picture,
    explained,
    hide_bars,
    interruptible,
    tell,
    version,
)
from hyperattention.cli.support import make_console as _console
from hyperattention.files.outputs import Outputs

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Near-linear attention over long contexts, with a measured error bar."
)

Text = Annotated[Path | None, typer.Option(help="Your own text, read in place of the held-out one.")]
Model = Annotated[Path | None, typer.Option(help="Folder of your own transformers model and its tokenizer; loss only.")]
Reference = Annotated[Path | None, typer.Option(help="Folder of another byte-level reference model, such as a checkpoint.")]
Plot = Annotated[Path, typer.Option(help="Picture to write; an earlier one under the default name is replaced.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the measurements as JSON lines.")]
Quick = Annotated[bool, typer.Option("--quick", help="A little of everything, once, on short inputs: to see that it works.")]
Repeats = Annotated[int | None, typer.Option(min=1, help="Rounds of interleaved timing.")]

_DEMO, _BENCH, _PARETO = (Path(f"hyperattention-{name}.png") for name in ("demo", "bench", "pareto"))

app.command(name="eval")(evaluate)
app.command(name="calibrate")(calibrate_model)
app.command(name="inspect")(inspect_model)
for command in (generate, cache, ask, retime):
    app.command()(command)


@app.callback()
def main(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Say which version.")] = False,
) -> None:
    """Near-linear attention over long contexts, with a measured error bar."""


@app.command()
def demo(
    length: Length = None,
    text: Text = None,
    model: Model = None,
    reference: Reference = None,
    speed_length: Annotated[int | None, typer.Option(min=64, help="Tokens of the structured inputs (32768).")] = None,
    repeats: Repeats = None,
    plot: Plot = _DEMO,
    json: Json = None,
    quick: Quick = False,
    seed: Seed = 0,
    encoding: Encoding = None,
    overwrite: Overwrite = False,
) -> None:
    """Show near-linear attention on a real model and on long inputs: speed, loss, retrieval and measured error."""
    console = _console()
    outputs = Outputs((plot, json), overwrite, (text, model, reference), _DEMO)
    with explained():
        _look(outputs, plot)
        check_inputs(model=model, reference=reference, text=text, encoding=encoding)
        from hyperattention.bench.speed import SpeedSettings
        from hyperattention.report import demo as report

        hide_bars()
        usual = report.DemoOptions()
        speed = SpeedSettings(repeats or 1, 64, memory=False) if quick else SpeedSettings(repeats or 3, 256)
        options = report.DemoOptions(
            length, text, model, reference or usual.reference, speed_length or (4096 if quick else usual.speed_length),
            1 if quick else usual.documents, usual.audit_rows, speed, seed, encoding,
        )  # fmt: skip
        prepared = report.prepare(options)
    with interruptible():
        results = report.run(prepared, console)
        report.show(prepared, results, console)
    with explained():
        outputs.check()
        report.save(prepared, results, plot=plot, records=json)
    tell(outputs)


@app.command()
def bench(
    min_length: Annotated[int, typer.Option(help="Shortest length; it doubles from there.")] = 4096,
    max_length: Annotated[int, typer.Option(help="Longest length; 131072 takes exact attention about an hour.")] = 32768,
    repeats: Repeats = None,
    plot: Plot = _BENCH,
    json: Json = None,
    quick: Quick = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Measure time, memory and error against length, beside SDPA: forward, backward, causal or not, d = 64, 128, GQA."""
    console, outputs = _console(), Outputs((plot, json), overwrite, default=_BENCH)
    with explained():
        _look(outputs, plot)
        from hyperattention.bench.speed import SpeedSettings
        from hyperattention.report import bench as report

        speed = SpeedSettings(repeats or 1, 64, memory=False) if quick else SpeedSettings(repeats or 3, 64)
        options = report.BenchOptions(min_length, max_length, speed, seed)
        report.list_cases(options)
    with interruptible():
        results = report.run(options, console)
    with explained():
        outputs.check()
        report.save(results, plot=plot, records=json)
    tell(outputs)


@app.command()
def pareto(
    length: Length = None,
    text: Text = None,
    model: Model = None,
    reference: Reference = None,
    budgets: Annotated[str | None, typer.Option(help="Keys listed a query, with commas between (512,1024,2048).")] = None,
    methods: Annotated[str | None, typer.Option(help="Names of methods, with commas between; all by default.")] = None,
    repeats: Repeats = None,
    loss: Annotated[bool, typer.Option(help="Also run the model with every method in all its layers.")] = True,
    plot: Plot = _PARETO,
    json: Json = None,
    quick: Quick = False,
    seed: Seed = 0,
    encoding: Encoding = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare all methods over budgets: time, error by head, loss and retrieval; which are on the Pareto front."""
    console = _console()
    outputs = Outputs((plot, json), overwrite, (text, model, reference), _PARETO)
    with explained():
        _look(outputs, plot)
        check_inputs(model=model, reference=reference, text=text, encoding=encoding)
        from hyperattention.bench.frontier import MeasureSettings
        from hyperattention.report import demo
        from hyperattention.report import pareto as report

        hide_bars()
        usual, own = demo.DemoOptions(), model is not None or reference is not None
        length = length or (2048 if quick and not own else None)
        inputs = demo.DemoOptions(
            length, text, model, reference or usual.reference, documents=1 if quick else usual.documents, seed=seed,
            encoding=encoding,
        )  # fmt: skip
        options = report.ParetoOptions(
            inputs,
            report.parse_budgets(budgets or ("512,768" if quick else "512,1024,2048")),
            None if methods is None else tuple(name.strip() for name in methods.split(",")),
            MeasureSettings(64, repeats or 1, 1) if quick else MeasureSettings(repeats=repeats or 3),
            loss=loss,
        )
        prepared = report.prepare(options)
    with interruptible():
        results = report.run(prepared, console)
        report.show(prepared, results, console)
    with explained():
        outputs.check()
        report.save(prepared, results, plot=plot, records=json)
    tell(outputs)


@app.command()
def doctor() -> None:
    """Say what is installed, which paths are available, and why one is not."""
    from hyperattention.cli.doctor import examine

    table = Table("", "what", "detail")
    table.columns[2].overflow = "fold"
    for finding in examine():
        mark = {None: Styled(""), True: Styled("yes", "green"), False: Styled("no", "red")}[finding.available]
        table.add_row(mark, finding.name, finding.detail)
    _console().print(table)


def _look(outputs: Outputs, plot: Path) -> None:
    outputs.check()
    check_picture(plot)


if __name__ == "__main__":
    app()
