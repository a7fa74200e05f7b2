"""The inspect command: the attention pattern, the method and the cost of every head, on one page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from plotly.graph_objects import Figure
from rich.console import Console

from hyperattention.bench.rows import find_default
from hyperattention.calibration.candidates import candidates
from hyperattention.calibration.head_statistics import SINKS, WINDOW, LayerFigures, inspect_layer
from hyperattention.calibration.measure import warm_up
from hyperattention.files.fingerprint import fingerprint
from hyperattention.files.plan import Plan
from hyperattention.files.plan_file import load_plan
from hyperattention.files.records import find_processor
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.default import default_method
from hyperattention.methods.exact import Exact
from hyperattention.reference.call_recorder import CallInputs
from hyperattention.reference.passes import watch_exact
from hyperattention.report.demo import DemoOptions, PreparedDemo, prepare
from hyperattention.report.maps import MapStyle, error_against_time, head_map, method_map
from hyperattention.report.page import Section, write_page
from hyperattention.report.progress import progress


@dataclass(frozen=True)
class InspectOptions:
    """The options of the command.

    Args:
        plan: the plan whose methods are shown; None for the default method in all layers.
        texts: model, text and length.
        rows: number of rows sampled for each head.
        ladder: candidates of the plot, exact attention first; None for those of `calibrate`.
    """

    plan: Path | None = None
    texts: DemoOptions = field(default_factory=lambda: DemoOptions(documents=1))
    rows: int = 256
    ladder: tuple[AttentionMethod, ...] | None = None


@dataclass(frozen=True)
class PreparedInspection:
    """Checked options with model, text and plan. `ready` raises all errors in the options before any slow work begins."""

    options: InspectOptions
    prepared: PreparedDemo
    plan: Plan | None


def ready(options: InspectOptions) -> PreparedInspection:
    """Load model, text and plan; a plan of another model is refused.

    Args:
        options: the options of the command.

    Returns:
        the checked options with model, text and plan.
    """
    plan = None if options.plan is None else load_plan(options.plan)
    prepared = prepare(options.texts)
    if plan is not None:
        plan.check(prepared.loaded.model)
    return PreparedInspection(options, prepared, plan)


def run(prepared: PreparedInspection, console: Console) -> list[LayerFigures]:
    """Measure every layer that can be approximated, with a progress bar.

    Args:
        prepared: model, text and plan.
        console: the console for progress.

    Returns:
        the figures, one entry for each layer.

    Raises:
        ValueError: if no layer can be approximated.
    """
    options, loaded, sample = prepared.options, prepared.prepared.loaded, prepared.prepared.samples[0]
    ladder = options.ladder or candidates(len(sample.tokens))
    found: list[LayerFigures] = []
    with progress(console, "inspect", fingerprint(loaded.model).num_layers) as on_step:

        def look(call: CallInputs) -> None:
            on_step(f"layer {call.layer}")
            served = _served(prepared.plan, call)
            if not found:
                warm_up(call, (*ladder, served))
            found.append(inspect_layer(call, served, ladder, rows=options.rows, seed=options.texts.seed))

        watch_exact(loaded, sample, look)
    if not found:
        raise ValueError(
            f"no attention call of {loaded.name} can be approximated, so there is nothing to show: see docs/models.md"
        )
    return found


def _served(plan: Plan | None, call: CallInputs) -> ByHead:
    heads = call.k.shape[1]
    if plan is None:
        return ByHead((find_default(),) * heads)
    return plan.layers.get(call.layer, ByHead((Exact(),) * heads))


def save(prepared: PreparedInspection, layers: Sequence[LayerFigures], path: Path) -> None:
    """Write the page.

    Args:
        prepared: model, text and plan.
        layers: the figures of each layer.
        path: the page.
    """
    loaded = prepared.prepared.loaded
    write_page(path, f"Attention of {loaded.name}", _introduce(prepared, layers), _sections(prepared, layers))


def _introduce(prepared: PreparedInspection, layers: Sequence[LayerFigures]) -> list[str]:
    length, rows = layers[0].num_keys, prepared.options.rows
    device = prepared.prepared.loaded.model.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else find_processor()
    shares = [share for layer in layers for share in layer.shares]
    errors = [error for layer in layers for error in layer.figures["error"]]
    what = "the default method" if prepared.plan is None else f"the plan {Path(prepared.options.plan or '').name}"
    lines = [
        f"{length:,} tokens of {prepared.prepared.source}; exact rows: {rows} sampled a head; times: {where}, "
        f"threads: {torch.get_num_threads()}. Point at a cell or a dot to see its numbers.",
        f"With {what}, heads list {sum(shares) / len(shares):.1%} of exact attention's pairs. The error of a head is "
        f"{sum(errors) / len(errors):.3f} on average and at most {max(errors):.3f}.",
    ]
    if prepared.plan is not None and not prepared.plan.pays(length):
        lines.append(_why_not(prepared.plan))
    if prepared.plan is None and isinstance(default_method(length, device=device), Exact):
        lines.append("At this length the default is exact attention; the page shows the default for longer inputs.")
    return lines


def _why_not(plan: Plan) -> str:
    if plan.crossover is None:
        return (
            "The plan was not faster than exact attention where it was calibrated, so `use` runs exact attention; the page "
            "shows the methods of the plan."
        )
    return f"At this length `use` runs exact attention: the plan is faster from {plan.crossover:,} keys on."


def _sections(prepared: PreparedInspection, layers: Sequence[LayerFigures]) -> list[Section]:
    chosen = "default method" if prepared.plan is None else "plan"
    return [*_cost_sections(layers), *_mass_sections(layers), *_row_sections(layers), *_choice_sections(layers, chosen)]


def _draw(layers: Sequence[LayerFigures], name: str, style: MapStyle) -> Figure:
    return head_map(layers, [layer.figures[name] for layer in layers], style)


def _cost_sections(layers: Sequence[LayerFigures]) -> list[Section]:
    """The error and the cost of the chosen method."""
    errors, low, high = ([layer.figures[name] for layer in layers] for name in ("error", "low", "high"))
    intervals = [
        [f"95% interval {a:.3f} to {b:.3f}" for a, b in zip(*pair, strict=True)] for pair in zip(low, high, strict=True)
    ]
    pairs, times = [layer.shares for layer in layers], [layer.time_ms for layer in layers]
    return [
        Section(
            "Error of the chosen method",
            "Mean relative error of output rows, ||out - exact|| / ||exact||. Dark heads have the largest error and need "
            "more keys.",
            head_map(layers, errors, MapStyle("relative error", ".3f", "Reds", least=0.0), intervals),
        ),
        Section(
            "Share of pairs",
            "Query-key pairs listed, relative to exact attention. Dark heads are the most expensive.",
            head_map(layers, pairs, MapStyle("of exact's pairs", ".3f", "Purples", least=0.0)),
        ),
        Section(
            "Time",
            "The time of a call in which the head's method runs all heads of the layer, divided by the number of heads. "
            "Compare with the plot at the end.",
            head_map(layers, times, MapStyle("ms", ".1f", "Greens", least=0.0)),
        ),
    ]


def _mass_sections(layers: Sequence[LayerFigures]) -> list[Section]:
    """The distribution of the attention weight over keys."""
    share = MapStyle("of the weight", least=0.0, most=1.0)
    return [
        Section(
            "Mass on sinks",
            f"Attention weight on the first {SINKS} tokens, mean over rows. Near 1, the head adds almost nothing.",
            _draw(layers, "sinks", share),
        ),
        Section(
            "Mass in the window",
            f"Attention weight on the nearest {WINDOW} tokens. Near 1, a window alone is enough for the head.",
            _draw(layers, "window", share),
        ),
        Section(
            "Far mass",
            "Attention weight on all other tokens, which a method has to find or draw. Dark heads depend on these tokens.",
            _draw(layers, "far", share),
        ),
    ]


def _row_sections(layers: Sequence[LayerFigures]) -> list[Section]:
    """The properties that make a head hard to approximate."""
    return [
        Section(
            "Entropy of rows",
            "Mean entropy, in nats; its exponential is the effective number of keys of a row. Low: the head is sharp, so "
            "find its heavy keys. High: the head is diffuse, so draw keys.",
            _draw(layers, "entropy", MapStyle("nats", ".2f", "Viridis", least=0.0)),
        ),
        Section(
            "Alpha",
            "The number of keys times the largest squared norm of a column of the attention matrix: large if one key, such "
            "as a sink, matters to all queries.",
            _draw(layers, "alpha", MapStyle("alpha", ".1e", "Viridis", logarithmic=True)),
        ),
        Section(
            "Kappa",
            "Largest over smallest row sum outside sinks and window: large if rows differ much in their weight on far keys.",
            _draw(layers, "kappa", MapStyle("kappa", ".1e", "Viridis", logarithmic=True)),
        ),
    ]


def _choice_sections(layers: Sequence[LayerFigures], chosen: str) -> list[Section]:
    """The chosen methods, and all candidates."""
    return [
        Section(
            "Chosen method",
            "The method of each head; query heads of one kv head share a method. Equal colours are equal methods.",
            method_map(layers),
            wide=True,
        ),
        Section(
            "Error against time",
            "Every dot is a candidate that runs all heads; the star is the chosen method of each head. Both are means over "
            "layers; errors are over all rows, of the worst query head of each kv head. Further left and lower is better. "
            "Click a layer in the legend to see only the candidates of that layer.",
            error_against_time(layers, chosen),
            wide=True,
        ),
    ]
