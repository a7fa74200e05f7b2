"""A calibrated plan against one method everywhere: query-key pairs at the same added loss, on the reference model.

    python benchmarks/plan.py                    # some 8 minutes on two cores
    python benchmarks/plan.py --judged 2 --draws 256 688 1800 --tolerances 0.06 --out /tmp/plan.jsonl    # a look, 2 minutes

The plan is calibrated on the first part of the held-out text and judged on documents of the rest, so that it is not judged
on what it was chosen by. The one method is the default or the thorough one, whichever adds less, the same in every head, at
several numbers of draws. Its pairs at a plan's added loss are interpolated on that curve in logarithms; where the plan adds
less than the dearest point of the curve, that point's pairs are a lower bound. The curve is made to fall by its running
minimum, which favours the one method. Beside the ratio stands the one at the plan's added loss plus one standard error.
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from claims import Record, announce, figure

from hyperattention.bench.candidates import own_methods
from hyperattention.bench.rows import Row
from hyperattention.calibration.calibrate import CalibrationSettings, calibrate
from hyperattention.files.plan import Plan
from hyperattention.files.records import write_records
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.reference.evaluate import ModelJudgement, evaluate
from hyperattention.reference.model import load_reference
from hyperattention.reference.samples import samples_of_documents
from hyperattention.reference.text import documents_from, held_out_text
from hyperattention.report.demo import judgement_record
from hyperattention.report.method_names import short_name
from hyperattention.report.tables import format_added
from hyperattention.select.draw import Draw

_BAR = 1.5
# the methods that run everywhere
_ONE = ("default", "thorough")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records" / "plan.jsonl")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=None, help="by default what the model was made for")
    parser.add_argument("--calibrated", type=int, default=2, help="documents that the plans are chosen by")
    parser.add_argument("--judged", type=int, default=8, help="documents that plans and methods are judged on")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--draws", type=int, nargs="+", default=[128, 256, 448, 688, 1200])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded, text = load_reference(), held_out_text()
    length = args.length or loaded.max_length
    # whole documents of the first third of the text; what follows them is never seen by the calibration
    split = len(text) // 3 // length * length
    chosen_by = samples_of_documents(documents_from(text[:split], length, args.calibrated, 1))
    judged_on = samples_of_documents(documents_from(text[split:], length, args.judged, 0))
    plans: dict[float, Plan] = {}
    with tempfile.TemporaryDirectory() as folder:
        for tolerance in args.tolerances:
            # the measurements are the same at every tolerance, so the second plan takes them from the journal
            plans[tolerance] = calibrate(
                loaded, chosen_by, CalibrationSettings(tolerance), Path(folder) / "journal", announce
            )
    own = own_methods()
    one = {f"{name}, {num} draws": drawing(own[name], num) for name in _ONE for num in args.draws}
    rows = [Row("exact", "exact", Exact())]
    rows += [Row(name, name, method) for name, method in one.items()]
    rows += [Row(f"plan {tolerance}", f"plan {tolerance}", plan.method) for tolerance, plan in plans.items()]
    results = {each.row: each for each in evaluate(loaded, judged_on, rows, audit_rows=0, on_step=announce)}
    curve = [results[name] for name in one]
    claims = [claim(plan, results[f"plan {tolerance}"], curve, results["exact"]) for tolerance, plan in plans.items()]
    shared = {"length": length, "documents": len(judged_on), "calibrated_on": len(chosen_by)}
    records = [*(shared | each for each in claims), *(shared | judgement_record(each) for each in results.values())]
    write_records(args.out, records, kind="plan")
    for each in claims:
        print(f"{'met' if each['met'] else 'MISSED'}: {each['claim']}: {each['shown']} ({each['bar']}); {each['beside']}")


def drawing(method: Method, num: int) -> Method:
    """The method with another number of draws."""
    *others, draw = method.stages
    assert isinstance(draw, Draw)
    return Method(*others, replace(draw, num=num), tile=method.tile)


def claim(plan: Plan, ours: ModelJudgement, curve: Sequence[ModelJudgement], exact: ModelJudgement) -> Record:
    """One figure: how many times more pairs the one method lists at this plan's added loss."""
    pairs, bounded = pairs_at(curve, ours.added_nats)
    ratio = pairs / ours.cost.pairs
    cautious = pairs_at(curve, ours.added_nats + (ours.added_error or 0.0))[0] / ours.cost.pairs
    methods = {layer: [short_name(each) for each in served.methods] for layer, served in plan.layers.items()}
    kept = "" if ours.retrieval is None else f", retrieval {ours.retrieval:.1%} (exact {exact.retrieval:.1%})"
    pays = "did not pay" if plan.crossover is None else f"pays from {plan.crossover:,} keys on"
    beside = (
        f"{ours.cost.pairs:.0f} pairs a query ({1 / ours.cost.share_of_exact:.1f}x fewer than exact), added "
        f"{format_added(ours)} nats a byte{kept}; {cautious:.2f}x at one standard error more; attention "
        f"{ours.attention_ratio.value:.1f}x as fast as exact; {pays}"
    )
    name = f"pairs of one method everywhere over a plan's at the same added loss, tolerance {plan.tolerance:g}"
    shown = f"{'at least ' if bounded else ''}{ratio:.2f}x"
    found = figure(name, f">= {_BAR}x", ratio, ratio >= _BAR, shown, beside)
    return dict(found) | {"cautious": cautious, "lower_bound": bounded, "plan": methods, "crossover": plan.crossover}


def pairs_at(curve: Sequence[ModelJudgement], added: float) -> tuple[float, bool]:
    """Pairs at which the one method adds this loss, and whether that is only a lower bound."""
    points, least = [], math.inf
    for each in sorted(curve, key=lambda each: each.cost.pairs):
        least = min(least, each.added_nats)
        points.append((each.cost.pairs, least))
    if added >= points[0][1]:
        # the cheapest point already adds no more: nothing cheaper was measured, so nothing more is claimed
        return points[0][0], False
    for (pairs, more), (next_pairs, less) in pairwise(points):
        if more > added >= less:
            # a loss below zero has no logarithm; the dearer end then stands for it
            share = 1.0 if less <= 0 or added <= 0 else math.log(more / added) / math.log(more / less)
            return pairs * (next_pairs / pairs) ** share, False
    return points[-1][0], True


if __name__ == "__main__":
    main()
