"""The tables of docs/choosing.md, a method for each need, from the records."""

import statistics
from collections.abc import Iterable, Mapping

from long_context_table import Added, added_by

# need, name in long_context.jsonl, code, name in the records of speeds
NEEDS = (
    ("the model must retrieve facts", "default", "`method=None`, `default_method`", "default"),
    ("a missed key costs more than time", "thorough", "`thorough_method`", "thorough"),
    ("time matters more than rare keys", "lean", "`lean_method`", "lean"),
    (
        "only the loss of ordinary text matters",
        "rival:anti_diagonal",
        "`rivals.AntiDiagonal` in a `Method`",
        "anti_diagonal",
    ),
    ("a baseline: uniform draws", "control", "`Sinks`, `Window`, `Draw` by `Uniform`", "control"),
    ("a baseline: no far keys at all", "sinks_window", "`Sinks`, `Window`", "sinks_window"),
    ("nothing may change", "exact", "`Exact()`", "exact"),
)
LINES = (
    "added loss, a plan for 800", "retrieval lost, a plan for 800",
    "added loss, a plan for 400", "retrieval lost, a plan for 400",
    "calls within tolerance 0.1,", "pairs of exact attention's, tolerance 0.1,",
    "calls within tolerance 0.05,", "pairs of exact attention's, tolerance 0.05,",
)  # fmt: skip


def table(records: Mapping[str, list[dict]]) -> str:
    """Write both tables: a method for each need, and what plans and tolerances gave."""
    lengths = [each for each in records.get("long_context", ()) if each["model"] == "reference" and each["run_on"] == "cpu"]
    longest = max((each["length"] for each in lengths), default=0)
    found = added_by(each for each in lengths if each["length"] == longest)
    lines = [
        "| need | method | keys a query | added nats a byte | answers right | error | causal call vs SDPA | with backward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    forward, backward = (_speeds(records.get(name, ()), longest) for name in ("causal_speed", "backward_speed"))
    for need, name, code, row in NEEDS:
        if name in found:
            times = f"{forward.get(row, 'not timed')} | {backward.get(row, 'not timed')}"
            lines.append(f"| {need} | {code} | {_figures(found[name])} | {times} |")
    figures = [each for name in ("plan", "tolerance") for each in records.get(name, ()) if each.get("part") == "figure"]
    beside = ["| figure | measured |", "|---|---|"]
    beside += [
        f"| {each['claim']} | {each['shown']} |" for begin in LINES for each in figures if each["claim"].startswith(begin)
    ]
    commits = dict.fromkeys(each["commit"][:10] for name in found for each, _ in found[name].pairs if name in _NAMES)
    measured = f"Measured at {longest:,} tokens, on a CPU, float32; commits {', '.join(commits)}."
    return "\n".join([*lines, "", *beside, "", measured])


_NAMES = frozenset(name for _, name, _, _ in NEEDS)


def _figures(added: Added) -> str:
    errors = [ours["error"]["mean"] for ours, _ in added.pairs if ours["error"]]
    right = statistics.fmean(ours["retrieval"] for ours, _ in added.pairs)
    keys, share = f"{added.pairs[0][0]['pairs']:,.0f}", f"{100 * right:.1f} %"
    if not errors:
        return f"{keys} | 0 | {share} | 0"
    return f"{keys} | {added.mean:+.4f}{added.spread} | {share} | {statistics.fmean(errors):.3f}"


def _speeds(records: Iterable[dict], length: int) -> dict[str, str]:
    return {
        each["row"]: f"{each['speedup']['value']:.1f}x"
        for each in records
        if "row" in each and each["case"]["length"] == length
    }
