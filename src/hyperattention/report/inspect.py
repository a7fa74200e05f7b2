"""The inspect command: the attention pattern, the method and the cost of every head, on one page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from hyperattention.bench.rows import find_default
from hyperattention.calibration.candidates import candidates
from hyperattention.calibration.head_statistics import LayerFigures, inspect_layer
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
from hyperattention.report.inspect_sections import sections
from hyperattention.report.page import write_page
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
    write_page(
        path,
        f"Attention of {loaded.name}",
        _introduce(prepared, layers),
        sections(layers, "default method" if prepared.plan is None else "plan"),
    )


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
