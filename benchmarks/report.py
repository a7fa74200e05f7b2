"""Write the measured table of the README from the committed records: no number there is typed.

python benchmarks/report.py            # rewrite the part of README.md between the markers
python benchmarks/report.py --check    # only tell, by the exit status, whether it is up to date
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: begin (benchmarks/report.py) -->", "<!-- measured: end -->"
ORDER = (
    "causal_speed", "causal_speed_long", "non_causal_speed_long", "backward_speed", "structured_error", "reference_error",
    "reference_loss", "growth", "audit_cost",
)  # fmt: skip


def read_records(folder: Path) -> dict[str, list[dict]]:
    paths = sorted(
        folder.glob("*.jsonl"), key=lambda path: (ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path.stem)
    )
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}


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


def replaced(text: str, table: str) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"README.md must contain these two lines once, in this order:\n{BEGIN}\n{END}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks" / "records")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = args.readme.read_text()
    after = replaced(before, write_table(read_records(args.records)))
    if args.check:
        sys.exit(f"{args.readme} is out of date: run python benchmarks/report.py" if after != before else 0)
    args.readme.write_text(after)


if __name__ == "__main__":
    main()
