"""Compare methods over budgets on the reference model's own attention and on structured inputs, beside their bars.

    python benchmarks/pareto.py                          # 32,768 tokens: half an hour on two cores
    python benchmarks/pareto.py --length 8192            # a quarter of an hour; write it elsewhere with --out and --plot
    python benchmarks/pareto.py --toy --out /tmp/p.jsonl --plot /tmp/p.png    # to see that the script runs; says nothing

Time and error of every method at every budget. The other methods have larger budgets too, since choosing keys well takes
time: they are compared at equal time. Lines of kind "figure" are what is claimed (pareto_claims.py), the others what it
rests on. Loss and retrieval of the methods at this length: `benchmarks/long_context.py`, with `rival:NAME` for the other
methods. `hyperattention pareto` does the same for a user's own model.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from claims import figure
from pareto_claims import equal_pairs, equal_time
from rich.console import Console

from hyperattention.bench.candidates import OWN, Candidate, candidates
from hyperattention.bench.frontier import MeasureSettings
from hyperattention.bench.rows import find_default
from hyperattention.files.records import plain, write_records
from hyperattention.reference.model import WEIGHTS
from hyperattention.report import demo, pareto
from hyperattention.report.pareto_plot import plot_pareto

ROOT = Path(__file__).parents[1]
LENGTH = 32_768
# the presets, the control, and the choices of MInference, Quest, XAttention and MagicPIG
METHODS = (
    "sinks_window", "control", "mean_key_blocks", "key_bound_blocks", "anti_diagonal", "vertical_slash", "collisions",
    "default", "lean",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    length: int = LENGTH
    budgets: tuple[int, ...] = (1216,)
    # budgets of the other methods alone
    larger: tuple[int, ...] = (4864,)
    methods: tuple[str, ...] = METHODS
    care: MeasureSettings = field(default_factory=lambda: MeasureSettings(256, 2, 1))
    seeds: int = 1
    reference: Path = WEIGHTS

    def options(self) -> pareto.ParetoOptions:
        inputs = demo.DemoOptions(self.length, reference=self.reference, documents=self.seeds)
        return pareto.ParetoOptions(inputs, self.budgets, care=self.care, seeds=self.seeds, loss=False)

    def candidates(self) -> tuple[Candidate, ...]:
        """Exact attention, all methods at each budget, and the others at the larger ones too."""
        others = [name for name in self.methods if name not in OWN]
        return (*candidates(self.budgets, self.methods), *candidates(self.larger, others)[1:])


TOY = Plan(2048, (512, 640), (768,), care=MeasureSettings(64, 1, 1))


def figures_of(records: Sequence[dict], plan: Plan) -> list:
    """All that is claimed, from the records."""
    found, usual = [], find_default().cost(plan.length).pairs
    own = max((slots for slots in plan.budgets if slots <= usual), default=min(plan.budgets))
    for name, where in ((pareto.MODEL, "the reference model's own q, k, v"), (pareto.STRUCTURED, "structured inputs")):
        points = [each for each in records if each["part"] == "attention" and each["inputs"] == name]
        place = f"{where}, {plan.length:,} tokens"
        found += [equal_pairs(points, place), equal_time(points, place, own)]
    return found


def claim_again(path: Path, plan: Plan) -> None:
    """Replace the claims of a record by what they are computed as now; where and when it was measured stays."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    old, measured = ([each for each in lines if (each["part"] == "figure") == claims] for claims in (True, False))
    where = {name: value for name, value in old[0].items() if name not in figure("", "", 0.0, True, "", "")}
    new = [plain(each) | where for each in figures_of(measured, plan)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*new, *measured]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "records" / "pareto.jsonl")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "pareto.png")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of every input")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names, as `hyperattention pareto --methods` takes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference", type=Path, default=WEIGHTS, help="folder of the reference model")
    parser.add_argument("--again", action="store_true", help="measure nothing: compute the claims anew from the record")
    parser.add_argument("--toy", action="store_true", help="short inputs, to see that the script runs")
    args = parser.parse_args()
    if args.toy and (args.out == parser.get_default("out") or args.plot == parser.get_default("plot")):
        parser.error("--toy measures nothing worth committing: name other files with --out and --plot")
    if args.again:
        return claim_again(args.out, Plan(args.length, methods=tuple(args.methods)))
    torch.set_num_threads(args.threads)
    began, console = time.perf_counter(), Console(width=150)
    plan = replace(TOY if args.toy else Plan(args.length, methods=tuple(args.methods)), reference=args.reference)
    prepared = replace(pareto.prepare(plan.options()), who=plan.candidates())
    print(f"time and error of {len(prepared.who)} methods and budgets", flush=True)
    points = pareto.run(prepared, console).points
    results = pareto.ParetoResults(points, ())
    pareto.show(prepared, results, console)
    measured = [plain(each) for each in pareto.records_of(prepared, results)]
    figures = figures_of(measured, plan)
    write_records(args.out, [*figures, *measured], kind="pareto")
    titles = {name: f"{name} q, k, v, {plan.length:,} tokens" for name in points}
    plot_pareto(args.plot, {titles[name]: found for name, found in points.items()}, prepared.who)
    for each in figures:
        print(f"  {'met' if each['met'] else 'MISSED'}: {each['claim']}: {each['shown']} ({each['bar']}); {each['beside']}")
    print(f"{time.perf_counter() - began:.0f} s; wrote {args.out} and {args.plot}")


if __name__ == "__main__":
    main()
