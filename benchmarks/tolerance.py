"""Measure what a tolerance promises: calls within it, what they spend, and what deciding costs beside an oracle.

    python benchmarks/tolerance.py                                # 104 captured cases and 12 structured: hours if shared
    python benchmarks/tolerance.py --documents 1 --structured 1   # a look: nine cases; goes on from there without the limits
    python benchmarks/tolerance.py --length 8192                  # beside what is recorded at 32,768
    python benchmarks/tolerance.py --times crossover overhead     # times as well; the second on a machine without other work
    python benchmarks/tolerance.py --toy --out /tmp/toy.jsonl     # short inputs, to see that the script runs

A captured case is one kv head of one layer with its query heads, of the reference model on a held-out document. Structured
inputs are of both kinds of heads. Each case is judged on all its rows, for every tolerance, and adds its lines to the record
at once; cases that are there are not run again. Lines of part "figure" are what is claimed, the others what it rests on.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from claims import Record, at_most, figure
from tolerance_inputs import CAPTURED, KINDS, Inputs, Name, captured_cases, captured_names, structured_case
from tolerance_times import measure_crossover, measure_overhead

from hyperattention.files.atomic_write import atomic_write
from hyperattention.files.records import environment, plain
from hyperattention.reference.model import load_reference
from hyperattention.reference.samples import samples_of_documents
from hyperattention.reference.text import held_out_documents

RECORDS = Path(__file__).parent / "records" / "tolerance.jsonl"
TOLERANCES = (0.1, 0.05)
# shares of exact attention's pairs at 32,768 tokens
BARS = {0.1: 0.35, 0.05: 0.6}
LENGTH = 32_768
# two exact calls differ by rounding, which no bound includes
ROUNDING = 1e-5
# more than the packaged text has: all documents are cut, so that a document's number names it
ALL = 10**6


def judge_case(case: Inputs) -> Iterator[Record]:
    for tolerance in TOLERANCES:
        out, report = case.within(tolerance)
        errors = case.errors(out)
        yield {
            "part": "case", **asdict(case.name), "heads": case.tensors[0].shape[1], "kv_heads": case.tensors[1].shape[1],
            "tolerance": tolerance, "options": case.options, "within": bool((errors <= tolerance).all()), "errors": errors,
            "bound": report.bound, "bounds_hold": bool((errors <= report.bound + ROUNDING).all()),
            "share_of_pairs": report.share_of_pairs, "exact_heads": len(report.exact_heads) / len(report.methods),
            "num_rows": report.num_rows, "methods": [repr(method) for method in report.methods], "note": report.note,
        }  # fmt: skip


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, records: Sequence[Record]) -> None:
    where = environment()
    lines = [json.dumps({"kind": "tolerance"} | {key: plain(x) for key, x in record.items()} | where) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(line + "\n" for line in lines))


def finished(records: list[dict]) -> set[Name]:
    """Name the cases that were judged at every tolerance."""
    at: dict[Name, set[float]] = {}
    for record in records:
        if record["part"] == "case":
            name = Name(*(record[field] for field in ("inputs", "number", "length", "layer", "kv_head")))
            at.setdefault(name, set()).add(record["tolerance"])
    return {name for name, tolerances in at.items() if tolerances >= set(TOLERANCES)}


def run_cases(first: int, documents: int, structured: int, length: int, path: Path) -> None:
    """Judge the cases that are missing: a document's, then one structured input, and so on."""
    loaded, done = load_reference(), finished(read(path))
    samples = samples_of_documents(held_out_documents(length, ALL))
    for number in range(max(documents, structured)):
        document = first + number
        if number < documents and document < len(samples):
            names = tuple(name for name in captured_names(loaded, document, length) if name not in done)
            for case in captured_cases(loaded, samples[document], names) if names else ():
                judge_and_append(case, path)
        if number < structured:
            name = Name([*KINDS][number % len(KINDS)], number // len(KINDS), length)
            if name not in done:
                judge_and_append(structured_case(name), path)


def judge_and_append(case: Inputs, path: Path) -> None:
    found = [*judge_case(case)]
    append(path, found)
    shown = ", ".join(f"{record['share_of_pairs']:.2f} at {record['tolerance']:g}" for record in found)
    print(f"    {case.name}: {shown} of exact's pairs; within: {[record['within'] for record in found]}", flush=True)


def summarise(cases: list[dict], length: int) -> Iterator[Record]:
    """Claims over the captured cases of a length; structured inputs beside them."""
    for tolerance in TOLERANCES:
        by_inputs = {
            name: [x for x in cases if (x["inputs"], x["length"], x["tolerance"]) == (name, length, tolerance)]
            for name in (CAPTURED, *KINDS)
        }
        if not (captured := by_inputs[CAPTURED]):
            continue
        beside = [
            f"{name}, {len(own)}: {mean(own, 'within'):.1%} within, {mean(own, 'share_of_pairs'):.2f} of exact's pairs, "
            f"{mean(own, 'exact_heads'):.0%} of kv heads exactly"
            for name, own in by_inputs.items()
            if own
        ]
        where = f"tolerance {tolerance:g}, {length:,} tokens, {len(captured)} captured calls"
        within, share = mean(captured, "within"), mean(captured, "share_of_pairs")
        held = mean([x for own in by_inputs.values() for x in own], "bounds_hold")
        shown = f"all bounds held in {held:.1%}"
        yield figure(f"calls within {where}", ">= 95 %", within, within >= 0.95, f"{within:.1%}", shown)
        if length == LENGTH:
            yield at_most(f"pairs of exact attention's, {where}", share, BARS[tolerance], "; ".join(beside))
        else:
            yield figure(f"pairs of exact attention's, {where}", "none", share, True, f"{share:.3g}x", "; ".join(beside))


def mean(records: list[dict], field: str) -> float:
    return statistics.fmean(float(record[field]) for record in records)


def write_figures(path: Path) -> list[dict]:
    """Put the claims over all cases in front of what they rest on, with the environment of the last case."""
    records = [record for record in read(path) if record.get("rests_on") != "cases"]
    cases, figures = [record for record in records if record["part"] == "case"], []
    for length in sorted({record["length"] for record in cases}, reverse=True):
        last = [record for record in cases if record["length"] == length][-1]
        where = {key: last[key] for key in environment()}
        figures += [
            {"kind": "tolerance"} | dict(record) | {"rests_on": "cases"} | where for record in summarise(cases, length)
        ]
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in [*figures, *records]))
    return figures


def append_times(path: Path, parts: list[str], repeats: int, length: int) -> None:
    """Replace the times that are recorded."""
    measured: dict[str, Callable[[], Iterator[Record]]] = {
        "crossover": lambda: measure_crossover(tuple(max(1, length // part) for part in (4, 2, 1)), repeats),
        "overhead": lambda: measure_overhead(length, repeats, TOLERANCES),
    }
    for part in parts:
        found = [{"rests_on": part} | dict(record) for record in measured[part]()]
        kept = [record for record in read(path) if record.get("rests_on") != part]
        atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept))
        append(path, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=13, help="documents of the reference model, eight cases each")
    parser.add_argument("--first", type=int, default=0, help="number of the first document")
    parser.add_argument("--structured", type=int, default=12, help="structured inputs, of both kinds in turn")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of all inputs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RECORDS, help="the record, which is added to")
    parser.add_argument("--times", nargs="+", default=[], choices=("crossover", "overhead"), help="measure times at the end")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of every time")
    parser.add_argument("--toy", action="store_true", help="short inputs, to see that the script runs; says nothing")
    args = parser.parse_args()
    if args.toy:
        if args.out == RECORDS:
            parser.error("--toy measures nothing worth committing: name another file with --out")
        args.documents, args.structured, args.repeats, args.length = 1, 2, 1, 4096
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        run_cases(args.first, args.documents, args.structured, args.length, args.out)
        if args.times:
            append_times(args.out, args.times, args.repeats, args.length)
    for record in write_figures(args.out):
        verdict = "met" if record["met"] else "MISSED"
        print(f"  {verdict}: {record['claim']}: {record['shown']} ({record['bar']}); {record['beside']}")


if __name__ == "__main__":
    main()
