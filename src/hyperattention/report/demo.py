"""The demo command: loss and retrieval of a model on long documents, and speed and error on long structured inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from hyperattention.bench.case import Case
from hyperattention.bench.rows import Row, rows
from hyperattention.bench.speed import Speed, SpeedSettings, measure_speed, steps_of
from hyperattention.files.records import write_records
from hyperattention.files.user_text import Text, read_text
from hyperattention.integrations.transformers import use
from hyperattention.methods.default import LEAN_CROSSOVER
from hyperattention.reference.evaluate import ModelJudgement, evaluate
from hyperattention.reference.model import WEIGHTS, LoadedModel, load_model, load_reference
from hyperattention.reference.samples import EvaluationSample, samples_of_documents, samples_of_text, tokens_of_text
from hyperattention.reference.text import documents_from, held_out_text
from hyperattention.report.demo_conclusions import conclude
from hyperattention.report.narrow import print_table
from hyperattention.report.plots import plot_demo
from hyperattention.report.progress import progress
from hyperattention.report.tables import depth_table, loss_table, speed_table

# default length limit, because exact attention has to run as well
_USUAL_LENGTH = 8192
# tokens in all documents together, where their number is not given, and the largest number of documents
_TOKENS, _DOCUMENTS = 32768, 4


@dataclass(frozen=True)
class DemoOptions:
    """The options of the command.

    Args:
        length: tokens of each document; None for the model's trained length, but not more than `most`.
        text: a file to read in place of the held-out text.
        model: folder of a model to evaluate in place of the reference model.
        reference: folder of the reference model.
        speed_length: tokens of the structured inputs.
        documents: number of documents; None for up to four, of about 32,768 tokens together.
        audit_rows: rows of every output that are compared with exact attention.
        speed: settings of the time measurement.
        seed: seed of documents, inputs and draws.
        encoding: encoding of the user's text; None for UTF-8, or for unchanged bytes with the reference model.
        most: largest length that is chosen if none is given.
    """

    length: int | None = None
    text: Path | None = None
    model: Path | None = None
    reference: Path = WEIGHTS
    speed_length: int = 32768
    documents: int | None = None
    audit_rows: int = 128
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    seed: int = 0
    encoding: str | None = None
    most: int = _USUAL_LENGTH

    def documents_of(self, length: int) -> int:
        """Return the number of documents of a length."""
        return self.documents or max(1, min(_DOCUMENTS, _TOKENS // length))


@dataclass(frozen=True)
class PreparedDemo:
    """Checked options with model and text. `prepare` raises all errors in the options before any slow work begins."""

    options: DemoOptions
    loaded: LoadedModel
    samples: tuple[EvaluationSample, ...]
    source: str


def read_long_text(path: Path, encoding: str | None) -> Text:
    """Read a user's text.

    Args:
        path: the file.
        encoding: the encoding that the user gave; None if none was given.

    Returns:
        the text.

    Raises:
        ValueError: if the file cannot be read, is empty, or is shorter than the least crossover.
    """
    text = read_text(path, encoding)
    if not text.data.strip():
        raise ValueError(f"{path} is empty: give a text of at least {LEAN_CROSSOVER:,} bytes")
    if len(text.data) < LEAN_CROSSOVER:
        raise ValueError(
            f"{path} has {len(text.data):,} bytes: below {LEAN_CROSSOVER:,} attention is exact; give a longer text"
        )
    return text


def prepare(options: DemoOptions) -> PreparedDemo:
    """Load the model, read the text and cut it into samples.

    Args:
        options: the options of the command.

    Returns:
        the checked options with model and samples.

    Raises:
        ValueError: if the text, the length or the model cannot be used; FileNotFoundError if a file is missing.
    """
    own = options.text
    text = Text(held_out_text(), "held-out text") if own is None else read_long_text(own, options.encoding)
    # a file that is not text is refused before a model is loaded
    words = "" if options.model is None else text.words()
    loaded = load_reference(options.reference) if options.model is None else load_model(options.model)
    with use(loaded.model, rows()[0].method):
        pass  # a model whose attention cannot be switched is refused here, before anything slow begins
    if options.length is not None and not 64 <= options.length <= loaded.max_length:
        raise ValueError(
            f"length {options.length} is out of range: {loaded.name} reads 64 to {loaded.max_length:,} tokens; set --length"
        )
    source = "held-out text" if options.text is None else options.text.name
    if loaded.tokenizer is None:
        length = options.length or min(options.most, loaded.max_length, len(text.data))
        samples = samples_of_documents(documents_from(text.data, length, options.documents_of(length), options.seed))
        return PreparedDemo(options, loaded, samples, source)
    length = options.length or _usable_length(loaded, words, options.most)
    return PreparedDemo(options, loaded, samples_of_text(words, loaded, length, options.documents_of(length)), source)


def _usable_length(loaded: LoadedModel, text: str, most: int) -> int:
    # the longest length that model and text allow; below the crossover nothing would be approximated
    longest = min(most, loaded.max_length)
    length = min(longest, len(tokens_of_text(text, loaded)))
    if length < LEAN_CROSSOVER:
        raise ValueError(
            f"only {length:,} tokens ({loaded.name} reads {loaded.max_length:,}): below {LEAN_CROSSOVER:,} attention is "
            "exact, so there is nothing to compare; give a longer text or a model with a longer context, or set --length"
        )
    return length


@dataclass(frozen=True)
class DemoResults:
    """The results of both parts of the demo."""

    judgements: tuple[ModelJudgement, ...]
    speeds: tuple[Speed, ...]
    case: Case


def run(prepared: PreparedDemo, console: Console, lines: Sequence[Row] | None = None) -> DemoResults:
    """Measure both parts, with a progress bar for each.

    Args:
        prepared: model and samples.
        console: the console for progress.
        lines: the rows to compare; None for the default rows.

    Returns:
        the results.
    """
    options, lines = prepared.options, rows() if lines is None else lines
    case = Case(options.speed_length, seed=options.seed)
    with progress(console, "1/2 loss and retrieval", len(lines) * len(prepared.samples)) as on_step:
        judgements = evaluate(
            prepared.loaded, prepared.samples, lines, seed=options.seed, audit_rows=options.audit_rows, on_step=on_step
        )
    with progress(console, "2/2 speed and error", steps_of(lines, options.speed)) as on_step:
        speeds = measure_speed(case, lines, options.speed, on_step)
    return DemoResults(judgements, speeds, case)


def show(prepared: PreparedDemo, results: DemoResults, console: Console) -> None:
    """Print the tables, and a sentence on each part.

    Args:
        prepared: model and samples.
        results: the measured results.
        console: the console to print to.
    """
    length, count = len(prepared.samples[0].tokens), len(prepared.samples)
    title = f"1. {prepared.loaded.name}, {count} x {length:,} tokens of {prepared.source}, all layers replaced"
    print_table(console, loss_table(results.judgements, title))
    if results.judgements[0].depths:
        print_table(console, depth_table(results.judgements))
    print_table(console, speed_table(results.speeds, results.case, "2. structured inputs, scattered heads"))
    for line in conclude(results.judgements, results.speeds, results.case, length, prepared.loaded.max_length):
        console.print(line)


def save(prepared: PreparedDemo, results: DemoResults, *, plot: Path | None, records: Path | None) -> None:
    """Write the plot and the records.

    Args:
        prepared: model and samples.
        results: the measured results.
        plot: the file of the plot; None for no plot.
        records: the file of JSON lines; None for no file.
    """
    if plot is not None:
        plot_demo(plot, results.judgements, prepared.loaded.name, results.speeds, results.case)
    if records is None:
        return
    shared: dict[str, object] = {
        "length": len(prepared.samples[0].tokens),
        "documents": len(prepared.samples),
        "seed": prepared.options.seed,
    }
    shared |= {"part": "loss and retrieval", "model": prepared.loaded.name}
    first = (shared | judgement_record(judgement) for judgement in results.judgements)
    second = ({"part": "speed and error", **speed.record(results.case)} for speed in results.speeds)
    write_records(records, (*first, *second), kind="demo")


def judgement_record(judgement: ModelJudgement) -> dict[str, object]:
    """Return a judgement as a record, with medians and quartiles of its times."""
    fields = dict(vars(judgement))
    for name in ("model", "attention"):
        timing = fields.pop(name)
        fields |= {f"{name}_median_s": timing.median, f"{name}_quartiles_s": timing.quartiles}
    return fields
