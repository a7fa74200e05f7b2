"""The calibrate command: measure, choose, write the plan, and say what it will do."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hyperattention.calibration.calibrate import CalibrationSettings, calibrate, steps_of
from hyperattention.files.plan import Plan
from hyperattention.files.plan_file import save_plan
from hyperattention.report.demo import DemoOptions as Texts
from hyperattention.report.demo import PreparedDemo, prepare
from hyperattention.report.method_names import short_name
from hyperattention.report.narrow import print_table
from hyperattention.report.progress import progress


@dataclass(frozen=True)
class CalibrateOptions:
    """What the user asked for.

    Args:
        out: the plan's file; what was measured so far stands beside it until the plan is whole.
        texts: model, text, length and number of documents.
        settings: how to calibrate.
        overwrite: whether a plan that is there may be replaced.
    """

    out: Path
    texts: Texts = field(default_factory=lambda: Texts(documents=2))
    settings: CalibrationSettings = field(default_factory=CalibrationSettings)
    overwrite: bool = False

    @property
    def journal(self) -> Path:
        """Where measurements are kept until the plan is whole."""
        return self.out.with_name(f"{self.out.name}.partial")


def ready(options: CalibrateOptions) -> PreparedDemo:
    """Load model and text; errors as for the demo."""
    return prepare(options.texts)


def run(prepared: PreparedDemo, options: CalibrateOptions, console: Console) -> Plan:
    """Calibrate with a bar, write the plan, and delete what was kept to resume from.

    Args:
        prepared: model and text.
        options: what was asked for.
        console: where progress goes.

    Returns:
        the plan.

    Raises:
        KeyboardInterrupt: as it came, once it is said how to go on.
    """
    if options.journal.exists():
        console.print(f"found {options.journal}: what it holds is not measured again")
    try:
        with progress(console, "calibrate", steps_of(prepared.loaded, prepared.samples)) as on_step:
            plan = calibrate(prepared.loaded, prepared.samples, options.settings, options.journal, on_step)
    except KeyboardInterrupt:
        console.print(f"stopped: what was measured is in {options.journal}, and the same command goes on from there")
        raise
    save_plan(plan, options.out, overwrite=options.overwrite)
    options.journal.unlink(missing_ok=True)
    return plan


def show(plan: Plan, console: Console) -> None:
    """Print what was chosen, by layer and head, and what it costs and saves.

    Args:
        plan: the plan.
        console: where to.
    """
    table = Table(title="method of each kv head, and its measured error", title_justify="left")
    table.add_column("layer", justify="right")
    heads = max(len(method.methods) for method in plan.layers.values())
    for head in range(heads):
        table.add_column(f"kv head {head}")
    for layer, method in plan.layers.items():
        entries = zip(method.methods, plan.errors[layer], strict=True)
        table.add_row(str(layer), *(f"{short_name(each)}  {error:.3f}" for each, error in entries))
    print_table(console, table)
    for line in conclude(plan):
        console.print(line)


def conclude(plan: Plan) -> list[str]:
    """Say in words what the plan does.

    Args:
        plan: the plan.

    Returns:
        a few sentences.
    """
    found = plan.measured
    fewer = found.exact_pairs_per_query / found.pairs_per_query
    methods = Counter(short_name(each) for method in plan.layers.values() for each in method.methods)
    exact = methods["exact"]
    return [
        f"At {found.length:,} tokens the plan scores {fewer:.1f}x fewer pairs than exact attention; {exact} of "
        f"{methods.total()} kv heads stay exact.",
        f"On these documents it adds {found.added_nats:+.4f} nats a byte, and every head errs at most {plan.tolerance:g} "
        "with all other layers exact; other texts may differ.",
        plan.payoff(),
    ]
