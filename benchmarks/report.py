"""Write the measured tables of the README and of pages of docs/ from the records: no number is typed.

python benchmarks/report.py            # rewrite the parts between the markers, and plot the GPU records
python benchmarks/report.py --check    # only tell, by the exit status, whether the tables are up to date
"""

import argparse
import json
import sys
from pathlib import Path

import choosing_table
import fine_tune_table
import harder_tasks_table
import head_kinds_table
import long_context_table
from gpu.table import gpu_table, plot_gpu
from real import table as real_table

ROOT = Path(__file__).parents[1]
MEASURED = "<!-- measured: begin (benchmarks/report.py) -->", "<!-- measured: end -->"
LONG_CONTEXT = "<!-- long context: begin (benchmarks/report.py) -->", "<!-- long context: end -->"
REAL_MODEL = "<!-- real model: begin (benchmarks/report.py) -->", "<!-- real model: end -->"
HEAD_KINDS_RECORDS = head_kinds_table.RECORDS, head_kinds_table.LONG_RECORDS
HEAD_KINDS = "<!-- kinds of heads: begin (benchmarks/report.py) -->", "<!-- kinds of heads: end -->"
HARDER_TASKS = "<!-- harder tasks: begin (benchmarks/report.py) -->", "<!-- harder tasks: end -->"
LONGER_RECORDS = "longer_context.jsonl"
LONGER = "<!-- longer context: begin (benchmarks/report.py) -->", "<!-- longer context: end -->"
FINE_TUNE = "<!-- fine-tuning: begin (benchmarks/report.py) -->", "<!-- fine-tuning: end -->"
CHOOSING = "<!-- choosing: begin (benchmarks/report.py) -->", "<!-- choosing: end -->"
GPU_FIGURES = "<!-- gpu figures: begin -->", "<!-- gpu figures: end -->"
# records of benchmarks/gpu/run.py, which have a table of their own
GPU_RECORDS, GPU_PLOT = "gpu.jsonl", "gpu.png"
ORDER = (
    "causal_speed", "causal_speed_long", "non_causal_speed_long", "backward_speed", "structured_error",
    "reference_gate", "real_figures", "pareto", "plan", "tolerance", "growth",
    "selection_at_length", "audit_cost", "cache_decode", "cache_quality", "subgen",
)  # fmt: skip


def read_records(folder: Path) -> dict[str, list[dict]]:
    paths = sorted(
        (path for path in folder.glob("*.jsonl") if path.name != GPU_RECORDS),
        key=lambda path: (ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path.stem),
    )
    return {path.stem: read_lines(path) for path in paths}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_long_context(records: list[dict]) -> str:
    """Write the table of loss and retrieval on the packaged model, on a CPU, at its full length."""
    found = [record for record in records if record["model"] == "reference" and record["run_on"] == "cpu"]
    longest = max((record["length"] for record in found), default=0)
    found = [record for record in found if record["length"] == longest and record["name"] in long_context_table.NAMES]
    if not found:
        return "Nothing is recorded yet: run `python benchmarks/long_context.py`."
    commits = ", ".join(dict.fromkeys(record["commit"][:10] for record in found))
    return f"{long_context_table.table(found)}\n\nMeasured at {longest:,} tokens, on a CPU, float32; commits {commits}."


def write_longer_context(records: list[dict]) -> str:
    """Write a table for each length beyond the packaged model's own."""
    if not records:
        return "Nothing is recorded yet: run `python benchmarks/long_context.py --length 65536`."
    lengths: dict[int, list[dict]] = {}
    found = [record for record in records if record["model"] == "reference" and record["run_on"] == "cpu"]
    for record in sorted(found, key=lambda record: record["pairs"]):
        lengths.setdefault(record["length"], []).append(record)
    tables = [f"{length:,} bytes:\n\n{long_context_table.table(passes)}" for length, passes in sorted(lengths.items())]
    of_each = (record["commit"].partition("+") for record in found)
    commits = ", ".join(
        dict.fromkeys(f"{commit[:10]}{' with changes' if changed else ''}" for commit, _, changed in of_each)
    )
    return "\n\n".join([*tables, f"Measured on a CPU, float32; commits {commits}."])


def write_head_kinds(records: list[dict]) -> str:
    """Write the tables of both kinds of structured heads: errors of the presets, and what keys are like."""
    if not records:
        return "Nothing is recorded yet: run `python benchmarks/head_kinds.py`."
    commits = ", ".join(dict.fromkeys(record["commit"][:10] for record in records))
    tables = f"{head_kinds_table.table(records)}\n\n{head_kinds_table.keys_table(records)}"
    return f"{tables}\n\nMeasured on a CPU, float32; commits {commits}."


def write_harder_tasks(records: list[dict]) -> str:
    """Write the tables of more than one kind of needle, at the longest recorded length."""
    longest = max((record["length"] for record in records), default=0)
    found = [record for record in records if record["length"] == longest]
    if not found:
        return "Nothing is recorded yet: run `python benchmarks/harder_tasks.py`."
    commits = ", ".join(dict.fromkeys(record["commit"][:10] for record in found))
    return f"{harder_tasks_table.tables(found)}\n\nMeasured at {longest:,} tokens, on a CPU, float32; commits {commits}."


def write_gpu_table(records: list[dict]) -> str:
    measured = any(record.get("part") == "forward" and record.get("contenders") for record in records)
    plot = f"\n\n![error against time on a GPU]({GPU_PLOT})" if measured else ""
    return gpu_table(records) + plot


def write_table(records: dict[str, list[dict]]) -> str:
    claims = [record for found in records.values() for record in found if record.get("part") == "figure"]
    if not claims:
        raise SystemExit("no figures recorded: run benchmarks/figures.py first")
    lines = ["| figure | bar | measured | beside it |", "|---|---|---|---|"]
    for claim in claims:
        shown = claim["shown"]
        if not claim["met"]:
            # a miss by less than the digits shown would read as met
            if claim["bar"].endswith(shown):
                shown = shown.replace(f"{claim['value']:.3g}", f"{claim['value']:.4g}")
            shown += " (**missed**)"
        lines.append(f"| {claim['claim']} | {claim['bar']} | {shown} | {claim['beside']} |")
    return "\n".join([*lines, "", *describe(claims)])


def describe(claims: list[dict]) -> list[str]:
    """Say where it was measured, once for each machine and version that took part."""
    places: dict[str, list[str]] = {}
    for claim in claims:
        place = f"{claim['device']}, {claim['threads']} threads, torch {claim['versions']['torch']}"
        commit, _, changed = (claim["commit"] or "none").partition("+")
        places.setdefault(place, []).append(f"{commit[:10]}{' with changes' if changed else ''}")
    return [f"Measured on {place}; commits {', '.join(dict.fromkeys(commits))}." for place, commits in places.items()]


def replaced(path: Path, *parts: tuple[str, tuple[str, str]]) -> str:
    text = path.read_text()
    for table, (begin, end) in parts:
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise SystemExit(f"{path.name} must contain these two lines once, in this order:\n{begin}\n{end}")
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks" / "records")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--measured", type=Path, default=ROOT / "docs" / "measured.md", help="page of all figures")
    parser.add_argument("--performance", type=Path, default=ROOT / "docs" / "performance.md", help="left out where missing")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    gpu = read_lines(args.records / GPU_RECORDS)
    lengths = read_lines(args.records / long_context_table.RECORDS.name)
    texts = {
        args.readme: replaced(
            args.readme,
            (write_long_context(lengths), LONG_CONTEXT),
            (real_table.brief_table(read_lines(args.records / real_table.RECORDS.name)), REAL_MODEL),
        ),
        args.measured: replaced(
            args.measured,
            (write_table(read_records(args.records)), MEASURED),
            (
                write_head_kinds([line for path in HEAD_KINDS_RECORDS for line in read_lines(args.records / path.name)]),
                HEAD_KINDS,
            ),
            (write_harder_tasks(read_lines(args.records / harder_tasks_table.RECORDS.name)), HARDER_TASKS),
            (write_longer_context(read_lines(args.records / LONGER_RECORDS)), LONGER),
        ),
    }
    if args.performance.exists():
        texts[args.performance] = replaced(args.performance, (write_gpu_table(gpu), GPU_FIGURES))
    if (choosing := args.measured.parent / "choosing.md").exists():
        texts[choosing] = replaced(choosing, (choosing_table.table(read_records(args.records)), CHOOSING))
    if (training := args.measured.parent / "training.md").exists():
        texts[training] = replaced(
            training, (fine_tune_table.table(read_lines(args.records / fine_tune_table.RECORDS.name)), FINE_TUNE)
        )
    if args.check:
        stale = [str(path) for path, text in texts.items() if text != path.read_text()]
        sys.exit(f"out of date: {', '.join(stale)}: run python benchmarks/report.py" if stale else 0)
    for path, text in texts.items():
        path.write_text(text)
    if args.performance.exists():
        plot_gpu(args.performance.parent / GPU_PLOT, gpu)


if __name__ == "__main__":
    main()
