"""The retime command: time a plan again, and print the old and the new times."""

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from hyperattention.calibration.retime import retime
from hyperattention.files.plan import Plan
from hyperattention.files.plan_file import load_plan, save_plan
from hyperattention.report.demo import DemoOptions, PreparedDemo, prepare
from hyperattention.report.progress import progress


@dataclass(frozen=True)
class PreparedRetime:
    """A checked plan with model and text. `ready` raises all errors in the options before any slow work begins."""

    plan: Plan
    prepared: PreparedDemo


def ready(path: Path, texts: DemoOptions) -> PreparedRetime:
    """Load plan, model and text; a plan of another model, or a text that is too short, is refused.

    Args:
        path: the plan's file.
        texts: model and text; the length is taken from the plan.

    Returns:
        the plan with model and text.
    """
    plan = load_plan(path)
    prepared = prepare(replace(texts, length=plan.measured.length, documents=1))
    plan.check(prepared.loaded.model)
    return PreparedRetime(plan, prepared)


def run(found: PreparedRetime, out: Path, console: Console, *, overwrite: bool) -> Plan:
    """Time the plan with a bar, and write it.

    Args:
        found: plan, model and text.
        out: the file to write.
        console: where progress goes.
        overwrite: whether a file that is there may be replaced.

    Returns:
        the plan with its new times.
    """
    loaded, sample = found.prepared.loaded, found.prepared.samples[0]
    with progress(console, "retime", len(found.plan.layers)) as on_step:
        plan = retime(found.plan, loaded, sample, on_step=on_step)
    save_plan(plan, out, overwrite=overwrite)
    return plan


def show(before: Plan, after: Plan, console: Console) -> None:
    """Print the old and the new times of a plan.

    Args:
        before: the plan with its old times.
        after: the plan with its new times.
        console: the console to print to.
    """
    console.print(f"Before: {before.payoff()}", markup=False, highlight=False)
    console.print(f"Now: {after.payoff()}", markup=False, highlight=False)
