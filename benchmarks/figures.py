"""Measure every figure the project promises, each beside its bar, and write it down as JSON lines.

    python benchmarks/figures.py                          # all of them: some hours on two cores
    python benchmarks/figures.py --only growth            # one; give --only again for more
    python benchmarks/figures.py --toy --out /tmp/toy     # short inputs, to see that the script runs; says nothing

A file a figure in benchmarks/records: lines of kind "figure" are what is claimed, the others what it rests on. The inputs,
the calls and the statistics are those of the command line (hyperattention.bench and hyperattention.reference).
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from attention_figures import (
    audit_cost,
    backward_speed,
    causal_speed,
    causal_speed_long,
    growth,
    non_causal_speed_long,
    selection_at_length,
    structured_error,
)
from claims import TOY, Plan
from model_figures import reference_gate

from hyperattention.files.records import write_records
from hyperattention.reference.model import WEIGHTS

FIGURES = (
    causal_speed,
    causal_speed_long,
    structured_error,
    non_causal_speed_long,
    backward_speed,
    reference_gate,
    growth,
    selection_at_length,
    audit_cost,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [each.__name__ for each in FIGURES]
    parser.add_argument("--only", action="append", choices=names, help="measure this one; may be given again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records", help="folder of the records")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference", type=Path, default=WEIGHTS, help="folder of the reference model")
    parser.add_argument("--toy", action="store_true", help="short inputs, to see that the script runs")
    args = parser.parse_args()
    if args.toy and args.out == parser.get_default("out"):
        parser.error("--toy measures nothing worth committing: name another folder with --out")
    torch.set_num_threads(args.threads)
    plan = replace(TOY if args.toy else Plan(), reference=args.reference)
    for measure_figure in FIGURES:
        name = measure_figure.__name__
        if args.only and name not in args.only:
            continue
        print(name, flush=True)
        records = measure_figure(plan)
        write_records(args.out / f"{name}.jsonl", records, kind=name)
        for record in records:
            if record.get("part") == "figure":
                verdict = "met" if record["met"] else "MISSED"
                print(f"  {verdict}: {record['claim']}: {record['shown']} ({record['bar']}); {record['beside']}")


if __name__ == "__main__":
    main()
