"""Compare all methods over budgets on the reference model's own attention and on structured inputs, beside their bars.

    python benchmarks/pareto.py                          # a quarter of an hour on two cores
    python benchmarks/pareto.py --toy --out /tmp/p.jsonl --plot /tmp/p.png    # to see that the script runs; says nothing

Time and error of every method at every budget; added loss and retrieval, at five times fewer pairs than exact attention, of
what the claims are about on all documents, and of the best other methods on fewer. Lines of kind "figure" are what is
claimed (pareto_claims.py), the others what it rests on. `hyperattention pareto` does the same for a user's own model.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from claims import announce, figure
from pareto_claims import FEWER, OURS, equal_pairs, equal_time, loss
from rich.console import Console

from hyperattention.bench.candidates import at_budget, own_methods
from hyperattention.bench.frontier import MeasureSettings, Point
from hyperattention.bench.rows import Row, find_default, window_of
from hyperattention.files.records import plain, write_records
from hyperattention.methods.base import exact_pairs
from hyperattention.reference.evaluate import ModelJudgement, evaluate
from hyperattention.reference.model import WEIGHTS
from hyperattention.report import demo, pareto
from hyperattention.report.pareto_plot import plot_pareto

ROOT = Path(__file__).parents[1]
LENGTH = 8192
# what our method's own sinks and window add by themselves
DROPPED = "sinks_window_of_ours"


@dataclass(frozen=True)
class Plan:
    length: int = LENGTH
    # beside the budget that makes pairs `fewer` times fewer, rounded down to a multiple of `step`
    budgets: tuple[int, ...] = (1024, 1536, 2048)
    step: int = 16
    fewer: float = FEWER
    care: MeasureSettings = field(default_factory=lambda: MeasureSettings(1024, 3, 4))
    seeds: int = 3
    documents: int = 24
    rivals: int = 4
    rival_documents: int = 8
    reference: Path = WEIGHTS

    @property
    def few(self) -> int:
        return int(exact_pairs(self.length, True) / self.fewer) // self.step * self.step

    def options(self) -> pareto.ParetoOptions:
        inputs = demo.DemoOptions(self.length, reference=self.reference, documents=self.documents)
        budgets = tuple(sorted({*self.budgets, self.few}))
        return pareto.ParetoOptions(inputs, budgets, care=self.care, seeds=self.seeds, loss=False)


TOY = Plan(2048, (640,), fewer=2, care=MeasureSettings(64, 1, 1), seeds=1, documents=2, rivals=1, rival_documents=1)


def best_rivals(points: Sequence[Point], plan: Plan) -> list[Row]:
    """The other methods that err least on the model's own attention, at the budget of few pairs."""
    apart = {*OURS, "control", "sinks_window"}
    others = [
        each
        for each in points
        if each.candidate.slots == plan.few
        and each.candidate.family not in apart
        and not each.candidate.oracle
        and each.cost.share_of_exact <= 1 / plan.fewer
    ]
    return [each.candidate.row for each in sorted(others, key=lambda each: each.error.mean)[: plan.rivals]]


def judge_loss(prepared: pareto.PreparedPareto, points: Sequence[Point], plan: Plan) -> tuple[ModelJudgement, ...]:
    """Run the model with what the claims are about on all documents, and with the best rivals on fewer."""
    loaded, samples = prepared.inputs.loaded, prepared.inputs.samples
    named = {each.row.name: each.row for each in prepared.who}
    core = [named[name] for name in ("exact", f"sinks_window@{plan.few}", f"control@{plan.few}")]
    dropped = Row(DROPPED, "sinks + window of the thorough method", window_of(at_budget(own_methods()[OURS[0]], plan.few)))
    ours = [named[f"{family}@{plan.few}"] for family in OURS]
    found = evaluate(loaded, samples, (*core, dropped, *ours), audit_rows=0, on_step=announce)
    rivals = [core[0], *best_rivals(points, plan)]
    return (*found, *evaluate(loaded, samples[: plan.rival_documents], rivals, audit_rows=0, on_step=announce)[1:])


def figures_of(records: Sequence[dict], plan: Plan) -> list:
    """All that is claimed, from the records."""
    found = []
    budgets, usual = plan.options().budgets, find_default().cost(plan.length).pairs
    own = max((slots for slots in budgets if slots <= usual), default=min(budgets))
    for name, where in ((pareto.MODEL, "the reference model's own q, k, v"), (pareto.STRUCTURED, "structured inputs")):
        points = [each for each in records if each["part"] == "attention" and each["inputs"] == name]
        place = f"{where}, {plan.length:,} tokens"
        found += [equal_pairs(points, place), equal_time(points, place, own)]
    losses = {each["row"]: each for each in records if each["part"] == "loss"}
    names = ("exact", DROPPED, f"sinks_window@{plan.few}", f"{OURS[0]}@{plan.few}")
    return [*found, *loss(*(losses[name] for name in names))]


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
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference", type=Path, default=WEIGHTS, help="folder of the reference model")
    parser.add_argument("--again", action="store_true", help="measure nothing: compute the claims anew from the record")
    parser.add_argument("--toy", action="store_true", help="short inputs, to see that the script runs")
    args = parser.parse_args()
    if args.toy and (args.out == parser.get_default("out") or args.plot == parser.get_default("plot")):
        parser.error("--toy measures nothing worth committing: name other files with --out and --plot")
    if args.again:
        return claim_again(args.out, Plan())
    torch.set_num_threads(args.threads)
    plan, began, console = (
        replace(TOY if args.toy else Plan(), reference=args.reference),
        time.perf_counter(),
        Console(width=150),
    )
    prepared = pareto.prepare(plan.options())
    # the oracle takes as long as all methods together: one budget shows how far they are from it
    who = tuple(each for each in prepared.who if not each.oracle or each.slots == plan.few)
    prepared = replace(prepared, who=who)
    print(f"time and error of {len(prepared.who)} methods and budgets", flush=True)
    points = pareto.run(prepared, console).points
    print("loss and retrieval", flush=True)
    judgements = judge_loss(prepared, points[pareto.MODEL], plan)
    results = pareto.ParetoResults(points, judgements)
    pareto.show(prepared, results, console)
    measured = [plain(each) for each in pareto.records_of(prepared, results)]
    figures = figures_of(measured, plan)
    write_records(args.out, [*figures, *measured], kind="pareto")
    titles = {name: f"{name} q, k, v, {plan.length:,} tokens" for name in points}
    plot_pareto(args.plot, {titles[name]: found for name, found in points.items()}, prepared.who, judgements)
    for each in figures:
        print(f"  {'met' if each['met'] else 'MISSED'}: {each['claim']}: {each['shown']} ({each['bar']}); {each['beside']}")
    print(f"{time.perf_counter() - began:.0f} s; wrote {args.out} and {args.plot}")


if __name__ == "__main__":
    main()
