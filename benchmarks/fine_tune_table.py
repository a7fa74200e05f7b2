"""The table of fine-tuning through approximate attention, from the records of training/fine_tune.py."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

RECORDS = Path(__file__).parent / "records" / "fine_tune.jsonl"
EXACT = "exact"
NAMES = {EXACT: "exact attention", "default": "the default", "control": "control: same slots, uniform draws"}
# the curve is told by means over a third of the steps: each step reads another document, some harder than others
PARTS = 3


def table(records: Sequence[dict]) -> str:
    """Write the mean loss of each third of the steps; by steps, as each reads a document of its own, beside exact attention.

    Raises:
        ValueError: if a method approximated nothing, or not all calls.
    """
    runs = {record["method"]: record for record in records}
    if EXACT not in runs:
        return "Nothing is recorded yet: run `python training/fine_tune.py`."
    exact = runs[EXACT]["losses"]
    for name, run in runs.items():
        if name != EXACT and not (run["approximated"] == run["calls"] > 0 and run["share_of_exact"] < 1):
            raise ValueError(f"{name}: {run['approximated']} of {run['calls']} calls approximated; all are needed")
    each = len(exact) // PARTS
    thirds = [slice(at, at + each) for at in range(0, each * PARTS, each)]
    heads = [f"steps {part.start + 1} to {part.stop}" for part in thirds]
    lines = [
        f"| attention in training | pairs, exact = 1 | {' | '.join(heads)} | beyond exact, {heads[-1]} |",
        "|---" * (PARTS + 3) + "|",
    ]
    for name, label in NAMES.items():
        run = runs.get(name)
        if run is None:
            continue
        if len(run["losses"]) != len(exact):
            raise ValueError(f"{name}: {len(run['losses'])} steps where exact attention has {len(exact)}; run as many")
        share = "1" if name == EXACT else f"{run['share_of_exact']:.3f}"
        means = " | ".join(f"{mean(run['losses'][part]):.3f}" for part in thirds)
        beyond = mean(run["losses"][thirds[-1]]) - mean(exact[thirds[-1]])
        lines.append(f"| {label} | {share} | {means} | {'0' if name == EXACT else f'{beyond:+.4f}'} |")
    settings = f"{runs[EXACT]['length']:,} tokens, positions up to {runs[EXACT]['positions']:,}"
    commits = ", ".join(dict.fromkeys(run["environment"]["commit"][:10] for run in runs.values()))
    return "\n".join([*lines, "", f"Nats a byte; {settings}, batch 1, on a CPU; commits {commits}."])
