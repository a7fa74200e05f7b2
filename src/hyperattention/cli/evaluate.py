"""The command `eval`: how good a compressed cache is on a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hyperattention.cli.options import Encoding
from hyperattention.cli.support import check_inputs, explained, hide_bars, make_console, names, numbers
from hyperattention.files.model_folder import WEIGHTS, find_folder
from hyperattention.report.evaluation_folder import check_evaluation_folder

_Folder = Annotated[str, typer.Argument(help="Folder of a transformers model, or 'reference': the embedded one.")]
_Names = "with commas between; all by default."


def evaluate(
    model: _Folder = "reference",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("hyperattention-eval"),
    lengths: Annotated[str | None, typer.Option(help="Tokens of context and question (2048,4096).")] = None,
    depths: Annotated[int | None, typer.Option(min=1, help="Ranges of depth that facts are hidden at (8).")] = None,
    budget: Annotated[str | None, typer.Option(help="Slots of each head, with commas between (512).")] = None,
    policies: Annotated[str | None, typer.Option(help=f"Policies beside the baselines, {_Names}")] = None,
    tasks: Annotated[str | None, typer.Option(help=f"Tasks, {_Names}")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds of texts, facts and draws (3).")] = None,
    documents: Annotated[
        int | None, typer.Option(min=0, help="Texts a seed whose continuation is read (8); 0 for none.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text to hide facts in; the held-out one if omitted.")] = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Read prompts in pieces of so many tokens, as a bounded memory needs.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of another byte-level reference model.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A little of everything, to see that it works.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished evaluation in the folder.")] = False,
    encoding: Encoding = None,
) -> None:
    """Hide facts at depths of long texts, ask a model that reads through a compressed cache, and compare policies."""
    console = make_console()
    with explained():
        check_evaluation_folder(out, (find_folder(model), reference or WEIGHTS), overwrite=overwrite)
        check_inputs(model=model, reference=reference, text=text, encoding=encoding)
        given_lengths = None if lengths is None else numbers("--lengths", lengths)
        given_budgets = None if budget is None else numbers("--budget", budget)
        _check_names(names(tasks) or (), names(policies), given_budgets or ())
        from hyperattention.report import evaluation as report

        hide_bars()
        usual = report.QUICK if quick else report.EvaluationOptions(out)
        options = report.EvaluationOptions(
            out,
            find_folder(model),
            reference or usual.reference,
            text,
            usual.tasks if tasks is None else names(tasks),
            names(policies),
            given_lengths or usual.lengths,
            given_budgets or usual.budgets,
            depths or usual.depths,
            seeds or usual.seeds,
            usual.documents if documents is None else documents,
            overwrite,
            chunk,
            encoding,
        )
        prepared = report.prepare(options)
    results = report.run(prepared, console)
    report.show(prepared, results, console)
    with explained():
        written = report.save(prepared, results)
    for path in written:
        typer.echo(f"wrote {path}")


def _check_names(tasks: Sequence[str], policies: Sequence[str] | None, budgets: Sequence[int]) -> None:
    """Refuse what is unknown, or a budget that is too small for a policy, before any slow package is imported."""
    from hyperattention.evaluation.families import choose_families
    from hyperattention.evaluation.tasks import check_tasks

    check_tasks(tasks)
    families = choose_families(policies)
    for budget in budgets:
        for family in families:
            family.check(budget)
