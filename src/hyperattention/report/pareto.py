"""The pareto command: all methods at several budgets, on a model's own attention, on structured inputs, in the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from hyperattention.bench.call import BenchCall
from hyperattention.bench.candidates import Candidate, candidates
from hyperattention.bench.frontier import MeasureSettings, Point, measure_frontier, steps_of
from hyperattention.bench.ranking import not_told_apart, rank
from hyperattention.files.records import write_records
from hyperattention.reference.evaluate import ModelJudgement, evaluate
from hyperattention.reference.model import LoadedModel
from hyperattention.reference.passes import capture
from hyperattention.reference.samples import EvaluationSample
from hyperattention.report import demo
from hyperattention.report.narrow import print_table
from hyperattention.report.pareto_plot import plot_pareto
from hyperattention.report.progress import progress
from hyperattention.report.tables import depth_table, frontier_table, loss_table
from hyperattention.synthetic import structured

MODEL, STRUCTURED = "model", "structured"
STRUCTURED_HEADS = 4


@dataclass(frozen=True)
class ParetoOptions:
    """The options of the command.

    Args:
        inputs: the model, the text, the length, the number of documents for the loss, and the seed.
        budgets: numbers of keys listed for each query.
        methods: names of the methods; None for all.
        care: settings of the measurement of errors and times.
        seeds: number of documents, and of structured inputs, on which errors are measured.
        loss: whether the model also runs with every method except the oracle in all its layers.
    """

    inputs: demo.DemoOptions = field(default_factory=demo.DemoOptions)
    budgets: tuple[int, ...] = (512, 1024, 2048)
    methods: tuple[str, ...] | None = None
    care: MeasureSettings = field(default_factory=MeasureSettings)
    seeds: int = 1
    loss: bool = True


@dataclass(frozen=True)
class PreparedPareto:
    """Checked options with methods, model and text. `prepare` raises all errors in the options before any slow work."""

    options: ParetoOptions
    who: tuple[Candidate, ...]
    inputs: demo.PreparedDemo

    @property
    def length(self) -> int:
        """The number of tokens of every input."""
        return len(self.inputs.samples[0].tokens)


@dataclass(frozen=True)
class ParetoResults:
    """The results: time and error on two kinds of inputs, and the loss of the model with each method."""

    points: dict[str, tuple[Point, ...]]
    judgements: tuple[ModelJudgement, ...]


def prepare(options: ParetoOptions) -> PreparedPareto:
    """List the methods, load the model and cut its text.

    Args:
        options: the options of the command.

    Returns:
        the checked options with methods, model and text.

    """
    who = candidates(options.budgets, options.methods)
    return PreparedPareto(options, who, demo.prepare(options.inputs))


def model_calls(
    loaded: LoadedModel, samples: Sequence[EvaluationSample], exact: Candidate, seed: int
) -> tuple[BenchCall, ...]:
    """Record a model's own queries, keys and values in all layers.

    Args:
        loaded: the model.
        samples: the texts that the model reads.
        exact: exact attention, which the model runs.
        seed: seed of the first sample; each further sample has the next seed.

    Returns:
        a call for each sample and layer.
    """
    return tuple(
        BenchCall(each.q, each.k, each.v, each.scale, each.layer, seed + turn)
        for turn, sample in enumerate(samples)
        for each in capture(loaded, sample, exact.row)
    )


def structured_calls(length: int, count: int, seed: int) -> tuple[BenchCall, ...]:
    """Make structured inputs, with heads from diffuse to sharp.

    Args:
        length: number of tokens.
        count: number of inputs.
        seed: seed of the first input; each further input has the next seed.

    Returns:
        one call for each input.
    """
    made = (structured(length, heads=STRUCTURED_HEADS, seed=seed + turn) for turn in range(count))
    return tuple(BenchCall(each.q, each.k, each.v, seed=seed + turn) for turn, each in enumerate(made))


def run(prepared: PreparedPareto, console: Console) -> ParetoResults:
    """Measure all parts, with a progress bar for each.

    Args:
        prepared: methods, model and samples.
        console: the console for progress.

    Returns:
        the results.
    """
    options, who = prepared.options, prepared.who
    loaded, samples, seed = prepared.inputs.loaded, prepared.inputs.samples, options.inputs.seed
    calls = {
        MODEL: model_calls(loaded, samples[: options.seeds], who[0], seed),
        STRUCTURED: structured_calls(prepared.length, options.seeds, seed),
    }
    parts, points = 2 + options.loss, {}
    # structured calls have no different layers, so one call is timed
    care = {MODEL: options.care, STRUCTURED: replace(options.care, timed=1)}
    for turn, (name, given) in enumerate(calls.items(), 1):
        with progress(console, f"{turn}/{parts} {name} q, k, v", steps_of(given, who, care[name])) as on_step:
            points[name] = measure_frontier(given, who, care[name], on_step)
    judgements: tuple[ModelJudgement, ...] = ()
    if options.loss:
        rows = [candidate.row for candidate in who if not candidate.oracle]
        with progress(console, "3/3 loss and retrieval", len(rows) * len(samples)) as on_step:
            # no audit here: errors were measured before, on the same inputs for all methods
            judgements = evaluate(loaded, samples, rows, seed=seed, audit_rows=0, on_step=on_step)
    return ParetoResults(points, judgements)


def show(prepared: PreparedPareto, results: ParetoResults, console: Console) -> None:
    """Print the tables, and the methods whose order may be due to chance.

    Args:
        prepared: methods, model and samples.
        results: the measured results.
        console: the console to print to.
    """
    loaded, length = prepared.inputs.loaded.name, prepared.length
    titles = {MODEL: f"1. {loaded}'s own q, k, v", STRUCTURED: "2. structured q, k, v, scattered heads"}
    for name, points in results.points.items():
        print_table(console, frontier_table(points, f"{titles[name]}, {length:,} tokens, causal"))
    if results.judgements:
        count = len(prepared.inputs.samples)
        print_table(
            console, loss_table(results.judgements, f"3. {loaded}, {count} x {length:,} tokens, all layers replaced")
        )
        if results.judgements[0].depths:
            print_table(console, depth_table(results.judgements))
    for found in rankings(results):
        for chain in found["not_told_apart"]:
            console.print(f"The order of these methods may be due to chance ({found['of']}): {' ~ '.join(chain)}")


def rankings(results: ParetoResults) -> list[dict]:
    """Rank methods by error at each budget, on each kind of inputs, and by their added loss.

    Args:
        results: the measured results.

    Returns:
        one record for each ranking: every step from one method to the next with the interval of the difference, and the
        methods whose order may be due to chance.
    """
    found = []
    for name, points in results.points.items():
        for slots in dict.fromkeys(each.candidate.slots for each in points if each.candidate.slots is not None):
            pieces = {each.candidate.title: each.pieces for each in points if each.candidate.slots == slots}
            found.append({"of": f"error, {name} q, k, v, {slots:,} keys a query", "slots": slots, "steps": rank(pieces)})
    if results.judgements:
        # every method reads the documents in the same order, but some methods read fewer documents
        count = min(len(each.nats_per_byte) for each in results.judgements)
        losses = {each.label: each.nats_per_byte[:count] for each in results.judgements}
        found.append({"of": f"added loss, {count} documents", "slots": None, "steps": rank(losses)})
    return [{"part": "ranking", **each, "not_told_apart": not_told_apart(each["steps"])} for each in found]


def records_of(prepared: PreparedPareto, results: ParetoResults) -> list[dict[str, object]]:
    """Return all results as records.

    Args:
        prepared: methods, model and samples.
        results: the measured results.

    Returns:
        a record for each kind of inputs, method and budget; for each method run in the model; and for each ranking.
    """
    shared = {"length": prepared.length, "seed": prepared.options.inputs.seed}
    model = {"model": prepared.inputs.loaded.name}
    care = {"audit_rows": prepared.options.care.audit_rows, "seeds": prepared.options.seeds}
    found: list[dict[str, object]] = []
    for name, points in results.points.items():
        found += [{"part": "attention", "inputs": name, **shared, **care, **point.record()} for point in points]
    for each in results.judgements:
        documents = len(each.nats_per_byte)
        found.append({"part": "loss", **shared, **model, "documents": documents, **demo.judgement_record(each)})
    return [*found, *rankings(results)]


def save(prepared: PreparedPareto, results: ParetoResults, *, plot: Path | None, records: Path | None) -> None:
    """Write the plot and the records.

    Args:
        prepared: methods, model and samples.
        results: the measured results.
        plot: the file of the plot; None for no plot.
        records: the file of JSON lines; None for no file.
    """
    if records is not None:
        write_records(records, records_of(prepared, results), kind="pareto")
    if plot is not None:
        titles = {MODEL: f"{prepared.inputs.loaded.name}'s own q, k, v", STRUCTURED: "structured q, k, v, scattered heads"}
        named = {f"{titles[name]}, {prepared.length:,} tokens": points for name, points in results.points.items()}
        plot_pareto(plot, named, prepared.who, results.judgements)
