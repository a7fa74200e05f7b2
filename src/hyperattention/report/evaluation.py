"""The eval command: prepare the model and text, ask the questions, print the results, and write them to a folder."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hyperattention.evaluation.families import choose_families
from hyperattention.evaluation.haystack import Haystack
from hyperattention.evaluation.policies import candidates_at
from hyperattention.evaluation.run import EvaluationPlan, Findings, check, evaluate, haystack_of
from hyperattention.evaluation.summary import Cell, Continuation, cells, continuations
from hyperattention.evaluation.tasks import TASKS
from hyperattention.files.user_text import Text, read_text
from hyperattention.integrations.transformers import use
from hyperattention.methods.exact import Exact
from hyperattention.reference.model import WEIGHTS, LoadedModel, load_model, load_reference
from hyperattention.reference.text import held_out_text
from hyperattention.report.evaluation_files import candidate_record, write_files
from hyperattention.report.evaluation_folder import HEAT_MAPS, METRICS, check_evaluation_folder
from hyperattention.report.evaluation_plot import plot_heat_map
from hyperattention.report.evaluation_tables import continuation_table, retrieval_table
from hyperattention.report.narrow import print_table
from hyperattention.report.progress import progress


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of the command.

    Args:
        out: the output folder.
        model: folder of a model; None for the reference model.
        reference: folder of the reference model.
        text: a file in which facts are hidden, and whose continuation is scored; None for the held-out text.
        tasks: names of tasks; None for all.
        policies: names of policies beside the baselines; None for all.
        lengths: largest number of tokens of context, questions and answers together.
        budgets: slots of each head.
        depths: number of ranges of depth.
        seeds: number of seeds.
        documents: texts for each seed whose continuation is scored; 0 for none.
        overwrite: whether a finished run in the folder may be replaced.
        chunk: tokens of each chunk in which prompts are read; None for one chunk.
        encoding: encoding of the user's text; None for UTF-8, or for unchanged bytes with the reference model.
    """

    out: Path
    model: Path | None = None
    reference: Path = WEIGHTS
    text: Path | None = None
    tasks: tuple[str, ...] | None = None
    policies: tuple[str, ...] | None = None
    lengths: tuple[int, ...] = (2048, 4096)
    budgets: tuple[int, ...] = (512,)
    depths: int = 8
    seeds: int = 3
    documents: int = 8
    overwrite: bool = False
    chunk: int | None = None
    encoding: str | None = None


# a short run of every part; the user gives the folder
QUICK = EvaluationOptions(
    Path(), tasks=("single", "multi-key"), lengths=(1024,), budgets=(256,), depths=4, seeds=1, documents=2
)


@dataclass(frozen=True)
class PreparedEvaluation:
    """Checked options with model and text. `prepare` raises all errors in the options before any slow work begins."""

    options: EvaluationOptions
    loaded: LoadedModel
    haystack: Haystack
    plan: EvaluationPlan


@dataclass(frozen=True)
class EvaluationResults:
    """The findings and their summary."""

    findings: Findings
    cells: tuple[Cell, ...]
    continuations: tuple[Continuation, ...]


def prepare(options: EvaluationOptions) -> PreparedEvaluation:
    """Load the model, read the text and check the folder.

    Args:
        options: the options of the command.

    Returns:
        the checked options with model, text and plan.
    """
    check_evaluation_folder(options.out, (options.model, options.reference), overwrite=options.overwrite)
    candidates = candidates_at(choose_families(options.policies), options.budgets)
    plan = EvaluationPlan(
        tuple(TASKS) if options.tasks is None else options.tasks,
        options.lengths,
        candidates,
        depths=options.depths,
        seeds=options.seeds,
        documents=options.documents,
        chunk=options.chunk,
    )
    own = options.text
    text = Text(held_out_text(), "held-out text") if own is None else read_text(own, options.encoding)
    if options.model is not None:
        text.words()  # a file that is not text is refused before a model is loaded
    loaded = load_reference(options.reference) if options.model is None else load_model(options.model)
    with use(loaded.model, Exact()):
        pass  # a model whose attention cannot be switched is refused here
    for candidate in candidates:
        candidate.cache(loaded.model, max(options.lengths), 0)  # a model whose cache cannot be compressed is refused here
    haystack = haystack_of(loaded, text)
    check(loaded, haystack, plan)
    return PreparedEvaluation(options, loaded, haystack, plan)


def run(prepared: PreparedEvaluation, console: Console) -> EvaluationResults:
    """Ask every question with every candidate, with a progress bar.

    Args:
        prepared: model, text and plan.
        console: the console for progress.

    Returns:
        the results.
    """
    with progress(console, "eval", prepared.plan.steps) as on_step:
        findings = evaluate(prepared.loaded, prepared.haystack, prepared.plan, on_step)
    return EvaluationResults(findings, cells(findings.replies, prepared.plan.depths), continuations(findings.losses))


def show(prepared: PreparedEvaluation, results: EvaluationResults, console: Console) -> None:
    """Print the tables of each length.

    Args:
        prepared: model, text and plan.
        results: the results.
        console: the console to print to.
    """
    for length in prepared.plan.lengths:
        found = [cell for cell in results.cells if cell.length == length]
        if found:
            print_table(console, retrieval_table(found, f"{prepared.loaded.name}, {length:,} tokens: answers found"))
        losses = [each for each in results.continuations if each.length == length]
        if losses:
            print_table(
                console, continuation_table(losses, f"{prepared.loaded.name}, {length:,} tokens: loss of the last quarter")
            )


def save(prepared: PreparedEvaluation, results: EvaluationResults) -> list[Path]:
    """Write all files into the folder; the metrics come last, because they mark the run as finished.

    Args:
        prepared: model, text and plan.
        results: the results.

    Returns:
        the files.
    """
    out, plan = prepared.options.out, prepared.plan
    # checked again, because the folder may have changed during the run
    check_evaluation_folder(out, (), overwrite=prepared.options.overwrite)
    out.mkdir(exist_ok=True)
    (out / METRICS).unlink(missing_ok=True)
    for old in out.glob(HEAT_MAPS):
        old.unlink()
    pictures = []
    for candidate in plan.candidates if results.cells else ():
        pictures.append(out / f"heat_map_{candidate.name.replace('@', '_')}.png")
        plot_heat_map(pictures[-1], [cell for cell in results.cells if cell.candidate == candidate], plan.depths)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(prepared.options).items()}
    who = [candidate_record(each) | {"sinks": each.sinks, "window": each.window} for each in plan.candidates]
    settings = options | vars(plan) | {"contenders": who, "tokens_of_text": len(prepared.haystack.tokens)}
    return [
        *pictures,
        *write_files(out, prepared.loaded, settings, results.findings, (results.cells, results.continuations)),
    ]
