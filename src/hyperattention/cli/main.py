"""The command line: parse, call, print."""

from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.table import Table
except ModuleNotFoundError as error:
    # before typer there is nothing to report an error with
    raise SystemExit(f"the command line needs {error.name}: pip install 'hyperattention[demo]'") from error

from hyperattention.cli.evaluate import evaluate
from hyperattention.cli.generate import ask, cache, generate
from hyperattention.cli.support import check_writable as _check_writable
from hyperattention.cli.support import explained as _explained
from hyperattention.cli.support import make_console as _console
from hyperattention.cli_retime import retime

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Near-linear attention over long contexts, with a measured error bar."
)

Length = Annotated[int | None, typer.Option(help="Tokens of each document; by default what the model was made for.")]
Text = Annotated[Path | None, typer.Option(help="Your own text, read in place of the held-out one.")]
Model = Annotated[Path | None, typer.Option(help="Folder of your own transformers model and its tokenizer; loss only.")]
ModelArgument = Annotated[str, typer.Argument(help="Folder of a transformers model, or 'reference': the embedded one.")]
TextArgument = Annotated[
    Path | None, typer.Argument(help="Text like what the model will read; the held-out one if omitted.")
]
Reference = Annotated[Path | None, typer.Option(help="Folder of another byte-level reference model, such as a checkpoint.")]
Plot = Annotated[Path | None, typer.Option(help="Picture to write.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the measurements as JSON lines.")]
Quick = Annotated[bool, typer.Option("--quick", help="A little of everything, once, on short inputs: to see that it works.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of documents, inputs and draws.")]
Repeats = Annotated[int | None, typer.Option(min=1, help="Rounds of interleaved timing.")]

app.command(name="eval")(evaluate)
for command in (generate, cache, ask, retime):
    app.command()(command)


@app.command()
def demo(
    length: Length = None,
    text: Text = None,
    model: Model = None,
    reference: Reference = None,
    speed_length: Annotated[int | None, typer.Option(min=64, help="Tokens of the structured inputs (32768).")] = None,
    repeats: Repeats = None,
    plot: Plot = Path("hyperattention-demo.png"),
    json: Json = None,
    quick: Quick = False,
    seed: Seed = 0,
) -> None:
    """Show near-linear attention on a real model and on long inputs: speed, loss, retrieval and measured error."""
    console = _console()
    with _explained():
        from transformers.utils import logging

        from hyperattention.bench.speed import Settings
        from hyperattention.report import demo as report

        logging.disable_progress_bar()
        _check_writable(plot, json)
        usual = report.Options()
        speed = Settings(repeats or 1, 64, memory=False) if quick else Settings(repeats or 3, 256)
        options = report.Options(
            length, text, model, reference or usual.reference, speed_length or (4096 if quick else usual.speed_length),
            1 if quick else usual.documents, usual.audit_rows, speed, seed,
        )  # fmt: skip
        prepared = report.prepare(options)
    results = report.run(prepared, console)
    report.show(prepared, results, console)
    report.save(prepared, results, plot=plot, records=json)
    console.print(*[f"wrote {path}" for path in (plot, json) if path is not None], sep="\n", markup=False)


@app.command()
def bench(
    min_length: Annotated[int, typer.Option(help="Shortest length; it doubles from there.")] = 4096,
    max_length: Annotated[int, typer.Option(help="Longest length; 131072 takes exact attention about an hour.")] = 32768,
    repeats: Repeats = None,
    plot: Plot = Path("hyperattention-bench.png"),
    json: Json = None,
    quick: Quick = False,
    seed: Seed = 0,
) -> None:
    """Measure time, memory and error against length, beside SDPA: forward, backward, causal or not, d = 64, 128, GQA."""
    console = _console()
    with _explained():
        from hyperattention.bench.speed import Settings
        from hyperattention.report import bench as report

        _check_writable(plot, json)
        speed = Settings(repeats or 1, 64, memory=False) if quick else Settings(repeats or 3, 64)
        options = report.Options(min_length, max_length, speed, seed)
        report.list_cases(options)
    results = report.run(options, console)
    report.save(results, plot=plot, records=json)
    console.print(*[f"wrote {path}" for path in (plot, json) if path is not None], sep="\n", markup=False)


@app.command(name="calibrate")
def calibrate_model(
    model: ModelArgument = "reference",
    text: TextArgument = None,
    tolerance: Annotated[float, typer.Option(help="Largest mean relative error of any head, on these documents.")] = 0.05,
    out: Annotated[Path, typer.Option(help="The plan to write.")] = Path("plan.json"),
    length: Length = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents read; the worst decides.")] = 2,
    seed: Seed = 0,
) -> None:
    """Choose a method for each layer and head of a model, by error and time measured here; resumed if interrupted."""
    console = _console()
    with _explained():
        from transformers.utils import logging

        from hyperattention.report import calibrate as report
        from hyperattention.report.demo import Options as Texts

        logging.disable_progress_bar()
        _check_writable(out)
        texts = Texts(length, text, report.find_folder(model), documents=documents, seed=seed)
        options = report.Options(out, texts, report.Settings(tolerance, seed))
        prepared = report.ready(options)
        plan = report.run(prepared, options, console)
    report.show(plan, console)
    console.print(f"wrote {out}: apply it with `use(model, load_plan({str(out)!r}))`", markup=False)


@app.command(name="inspect")
def inspect_model(
    model: ModelArgument = "reference",
    text: TextArgument = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("hyperattention-inspect.html"),
    plan: Annotated[Path | None, typer.Option(help="Show what this plan chose; by default the default method.")] = None,
    length: Length = None,
    seed: Seed = 0,
) -> None:
    """Draw where every head looks, what serves it and what that costs, as one page that needs no network."""
    console = _console()
    with _explained():
        from transformers.utils import logging

        from hyperattention.report import inspect as report
        from hyperattention.report.calibrate import find_folder
        from hyperattention.report.demo import Options as Texts

        logging.disable_progress_bar()
        _check_writable(out)
        texts = Texts(length, text, find_folder(model), documents=1, seed=seed)
        prepared = report.ready(report.Options(plan, texts))
        layers = report.run(prepared, console)
    report.save(prepared, layers, out)
    console.print(f"wrote {out}", markup=False)


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
    plot: Plot = Path("hyperattention-pareto.png"),
    json: Json = None,
    quick: Quick = False,
    seed: Seed = 0,
) -> None:
    """Compare all methods over budgets: time, error by head, loss and retrieval; which are on the Pareto front."""
    console = _console()
    with _explained():
        from transformers.utils import logging

        from hyperattention.bench.frontier import Care
        from hyperattention.report import demo
        from hyperattention.report import pareto as report

        logging.disable_progress_bar()
        _check_writable(plot, json)
        usual, own = demo.Options(), model is not None or reference is not None
        length = length or (2048 if quick and not own else None)
        inputs = demo.Options(
            length, text, model, reference or usual.reference, documents=1 if quick else usual.documents, seed=seed
        )  # fmt: skip
        options = report.Options(
            inputs,
            report.parse_budgets(budgets or ("512,768" if quick else "512,1024,2048")),
            None if methods is None else tuple(name.strip() for name in methods.split(",")),
            Care(64, repeats or 1, 1) if quick else Care(repeats=repeats or 3),
            loss=loss,
        )
        prepared = report.prepare(options)
    results = report.run(prepared, console)
    report.show(prepared, results, console)
    report.save(prepared, results, plot=plot, records=json)
    console.print(*[f"wrote {path}" for path in (plot, json) if path is not None], sep="\n", markup=False)


@app.command()
def doctor() -> None:
    """Say what is installed, which paths are available, and why one is not."""
    from hyperattention.cli.doctor import examine

    table = Table("", "what", "detail")
    for finding in examine():
        mark = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[finding.available]
        table.add_row(mark, finding.name, finding.detail)
    _console().print(table)


if __name__ == "__main__":
    app()
