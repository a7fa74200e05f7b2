"""The calibrate command: measure methods, choose one for each head, write the plan, and print its effect."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hyperattention.calibration.calibrate import calibrate, steps_of
from hyperattention.calibration.settings import CalibrationSettings
from hyperattention.files.plan import Plan
from hyperattention.files.plan_file import save_plan
from hyperattention.report.demo import DemoOptions, PreparedDemo, prepare
from hyperattention.report.method_names import short_name
from hyperattention.report.narrow import print_table
from hyperattention.report.progress import progress


@dataclass(frozen=True)
class CalibrateOptions:
    """The options of the command.

    Args:
        out: the file of the plan; measurements are saved beside it until the plan is complete.
        texts: model, text, length and number of documents.
        settings: settings of the calibration.
        overwrite: whether an existing plan may be replaced.
    """

    out: Path
    texts: DemoOptions = field(default_factory=lambda: DemoOptions(documents=2))
    settings: CalibrationSettings = field(default_factory=CalibrationSettings)
    overwrite: bool = False

    @property
    def journal(self) -> Path:
        """The file of the measurements until the plan is complete."""
        return self.out.with_name(f"{self.out.name}.partial")


def ready(options: CalibrateOptions) -> PreparedDemo:
    """Load model and text; raises the same errors as the demo."""
    return prepare(options.texts)


def run(prepared: PreparedDemo, options: CalibrateOptions, console: Console) -> Plan:
    """Calibrate with a progress bar, write the plan, and delete the saved measurements.

    Args:
        prepared: model and text.
        options: the options of the command.
        console: the console for progress.

    Returns:
        the plan.

    Raises:
        KeyboardInterrupt: if the user interrupts; the console then shows how to resume.
    """
    if options.journal.exists():
        console.print(f"found {options.journal}: its measurements are used, and not repeated")
    try:
        with progress(console, "calibrate", steps_of(prepared.loaded, prepared.samples, options.settings)) as on_step:
            plan = calibrate(prepared.loaded, prepared.samples, options.settings, options.journal, on_step)
    except KeyboardInterrupt:
        console.print(f"stopped: the measurements so far are in {options.journal}; run the same command again to resume")
        raise
    save_plan(plan, options.out, overwrite=options.overwrite)
    options.journal.unlink(missing_ok=True)
    return plan


def show(plan: Plan, console: Console) -> None:
    """Print the method of each layer and head, and the cost and savings of the plan.

    Args:
        plan: the plan.
        console: the console to print to.
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
    """Describe the effect of the plan in words.

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
        f"On these documents the plan adds {found.added_nats:+.4f} nats a byte. The measured error of every head is at most "
        f"{plan.tolerance:g} with all other layers exact. Other texts may differ.",
        plan.payoff(),
    ]
