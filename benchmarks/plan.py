"""What a plan loses on documents that its calibration did not see, at the pairs that it was made for.

    python benchmarks/plan.py                                    # 32,768 bytes; resumes; under an hour on two quiet cores
    python benchmarks/plan.py --length 4096 --pairs 400 --documents 1 --out /tmp/plan.jsonl            # a look, 3 minutes

The plan is chosen on the last third of the held-out text and judged on the documents that `long_context.py` reads, as far as
they lie before it; passes of exact attention and of one method everywhere that are recorded there are not run again. Each
measurement and pass is written at once. The plan is not timed: `calibrate` and `retime` do that.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from claims import Record, announce, figure
from long_context import ALL, find_method, measure, read
from long_context_table import RECORDS as LONG_RECORDS

from hyperattention.calibration.calibrate import choose_methods
from hyperattention.calibration.settings import CalibrationSettings
from hyperattention.files.atomic_write import atomic_write
from hyperattention.files.fields import Field
from hyperattention.files.method_table import method_from_json, method_to_json
from hyperattention.files.records import environment, plain
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.by_layer import ByLayer
from hyperattention.reference.model import LoadedModel, load_reference
from hyperattention.reference.samples import EvaluationSample, samples_of_documents
from hyperattention.reference.text import documents_from, held_out_documents, held_out_text
from hyperattention.report.method_names import short_name

RECORDS = Path(__file__).parent / "records" / "plan.jsonl"
# bars: nats a byte, points of retrieval, times fewer pairs than exact attention, times fewer than one method
_ADDED, _LOST, _FEWER, _ONE_METHOD = 0.01, 1.0, 20, 1.5
# documents of the last third that plans may be chosen by
_CHOSEN_BY = 2
# one method in every head, by increasing pairs
_EVERYWHERE = ("default", "thorough")


def split_text(length: int) -> tuple[bytes, int]:
    """The last third of the held-out text, in whole documents, and the number of documents before it."""
    text = held_out_text()
    before = len(text) // length * 2 // 3
    return text[before * length :], before


def find_plan(options: argparse.Namespace, loaded: LoadedModel, pairs: int, kept: list[dict]) -> dict:
    """The plan that is recorded, or a new one."""
    about = {"part": "plan", "length": options.length, "pairs": pairs, "calibrated_on": options.calibrated}
    for record in kept:
        if about.items() <= record.items():
            return record
    text, _ = split_text(options.length)
    chosen_by = samples_of_documents(documents_from(text, options.length, _CHOSEN_BY, 1)[: options.calibrated])
    options.journal.parent.mkdir(parents=True, exist_ok=True)
    chosen = choose_methods(loaded, chosen_by, CalibrationSettings(pairs=pairs), options.journal, announce)
    layers = {str(layer): [method_to_json(each) for each in served.methods] for layer, (served, _) in chosen.items()}
    names = {str(layer): [short_name(each) for each in served.methods] for layer, (served, _) in chosen.items()}
    errors = {str(layer): list(errors) for layer, (_, errors) in chosen.items()}
    return add(options.out, kept, about | {"layers": layers, "names": names, "errors": errors})


def method_of(plan: dict) -> ByLayer:
    """The plan as a method."""
    field = Field(plan["layers"], "plan.jsonl", "layers", "delete the line of the plan")
    served = {int(layer): [method_from_json(each) for each in heads.items()] for layer, heads in field.parts().items()}
    return ByLayer({layer: ByHead(tuple(heads)) for layer, heads in served.items()})


def add(path: Path, kept: list[dict], record: Record) -> dict:
    """Write a record at once."""
    line = json.loads(json.dumps(plain({"kind": "plan"} | dict(record) | environment())))
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    kept.append(line)
    return line


def judge(
    options: argparse.Namespace, loaded: LoadedModel, sample: EvaluationSample, document: int, name: str, kept: list[dict]
) -> None:
    """Run one document under a plan or one method, unless that pass is recorded."""
    key = {"part": "pass", "length": options.length, "document": document, "seed": 0, "name": name}
    if any(key.items() <= record.items() for record in kept) or find_pass(options.length, document, name, kept):
        return
    plans = {f"plan {record['pairs']}": record for record in kept if record.get("part") == "plan"}
    method = method_of(plans[name]) if name in plans else find_method(name)
    found = measure(loaded, sample, method, document, options.audit_rows)
    add(options.out, kept, key | dict(found))
    print(f"document {document}, {name}: {found['nats_per_byte']:.4f} nats a byte, {found['retrieval']:.3f} retrieved, "
          f"{found['seconds']:.0f} s", flush=True)  # fmt: skip


def find_pass(length: int, document: int, name: str, kept: Iterable[dict]) -> dict | None:
    """The pass that is recorded here, or the same one among the records of `long_context.py`."""
    key = {"length": length, "document": document, "seed": 0, "name": name}
    there = key | {"model": "reference", "run_on": "cpu", "dtype": "float32"}
    found = [each for each in kept if each.get("part") == "pass" and key.items() <= each.items()]
    return next(iter(found or [each for each in read(LONG_RECORDS) if there.items() <= each.items()]), None)


def summary(length: int, name: str, documents: Iterable[int], kept: list[dict]) -> dict:
    """Loss, retrieval and pairs relative to exact attention, over the documents that both have read."""
    both = [[find_pass(length, each, of, kept) for of in (name, "exact")] for each in documents]
    passes = [(ours, exact) for ours, exact in both if ours is not None and exact is not None]
    added = [ours["nats_per_byte"] - exact["nats_per_byte"] for ours, exact in passes]
    lost = [100 * (exact["retrieval"] - ours["retrieval"]) for ours, exact in passes]
    spread = statistics.stdev(added) / math.sqrt(len(added)) if len(added) > 1 else None
    first = passes[0][0]
    return {"name": name, "documents": len(passes), "added": statistics.fmean(added), "spread": spread,
            "lost": statistics.fmean(lost), "pairs": first["pairs"], "products": first["selection_pairs"],
            "fewer": 1 / first["share_of_exact"]}  # fmt: skip


def claims(options: argparse.Namespace, plan: dict, kept: list[dict]) -> list[Record]:
    """The figures of one plan: loss, retrieval, and pairs of one method everywhere at the same loss."""
    numbers = range(options.documents)
    found, *others = (summary(options.length, name, numbers, kept) for name in (f"plan {plan['pairs']}", *_EVERYWHERE))
    shared = {"length": options.length, "documents": found["documents"], "calibrated_on": plan["calibrated_on"]}
    spread = "" if found["spread"] is None else f" ± {found['spread']:.4f}"
    rest = "; ".join(f"{x['name']} {x['added']:+.4f}, {x['lost']:.1f} points, {x['pairs']:,.0f} pairs" for x in others)
    beside = (
        f"{found['pairs']:,.0f} pairs a query, and {found['products']:,.0f} products to choose them; documents: "
        f"{found['documents']} judged, {plan['calibrated_on']} other for the plan; one method everywhere, with draws for 64 "
        f"alike queries, where plans have some for 16: {rest}"
    )
    name = f"a plan for {plan['pairs']} pairs a query, {options.length:,} bytes, all layers"
    enough = found["fewer"] >= _FEWER
    ratio, bounded = pairs_at(others, found["added"])
    ratio /= found["pairs"]
    more = "at least " if bounded else ""
    fewer = f"{found['fewer']:.1f}x"
    three = (
        figure(
            f"added loss, {name}", f"<= {_ADDED} nats a byte at >= {_FEWER}x fewer pairs", found["added"],
            found["added"] <= _ADDED and enough, f"{found['added']:+.4f}{spread} nats at {fewer}", beside,
        ),
        figure(
            f"retrieval lost, {name}", f"<= {_LOST:g} point", found["lost"], found["lost"] <= _LOST,
            f"{found['lost']:.2f} points", f"{fewer} fewer pairs than exact attention",
        ),
        figure(
            f"pairs of one method everywhere over those of {name}, at the same loss", f">= {_ONE_METHOD}x",
            ratio, ratio >= _ONE_METHOD, f"{more}{ratio:.2f}x", "on the line from default to thorough",
        ),
    )  # fmt: skip
    return [shared | dict(each) for each in three]


def pairs_at(curve: list[dict], added: float) -> tuple[float, bool]:
    """Pairs at which the one method adds this loss, and whether that is only a lower bound."""
    points = sorted((each["pairs"], each["added"]) for each in curve)
    if added >= points[0][1]:
        # nothing cheaper was measured, so nothing more is claimed
        return points[0][0], False
    for (pairs, more), (next_pairs, less) in pairwise(points):
        if more > added >= less:
            share = 1.0 if less <= 0 or added <= 0 else math.log(more / added) / math.log(more / less)
            return pairs * (next_pairs / pairs) ** share, False
    return points[-1][0], True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--journal", type=Path, help="measurements of the calibration; by default in build/, one a length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=32_768, help="bytes of a document")
    parser.add_argument("--calibrated", type=int, default=1, choices=(1, _CHOSEN_BY), help="documents it is chosen by")
    parser.add_argument("--documents", type=int, default=4, help="documents that it is judged on")
    parser.add_argument(
        "--first", type=int, default=0, help="first document to read now; figures count all that are recorded"
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[800, 400], help="keys that a query may list, one plan each")
    parser.add_argument("--audit-rows", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.journal = options.journal or Path("build") / f"plan-{options.length}-{options.calibrated}.journal"
    loaded, (_, before) = load_reference(), split_text(options.length)
    samples = samples_of_documents(held_out_documents(options.length, ALL))[: min(before, options.documents)]
    kept = read(options.out)
    plans = [find_plan(options, loaded, pairs, kept) for pairs in options.pairs]
    for document, sample in list(enumerate(samples))[options.first :]:
        for name in ("exact", *_EVERYWHERE, *(f"plan {plan['pairs']}" for plan in plans)):
            judge(options, loaded, sample, document, name, kept)
    found = [dict(each) for plan in plans for each in claims(options, plan, kept)]
    figures = [plain({"kind": "plan"} | each | environment()) for each in found]
    told = {each["claim"] for each in found}
    others = [each for each in kept if each.get("claim") not in told]
    atomic_write(options.out, "".join(json.dumps(each) + "\n" for each in (*figures, *others)))
    for each in found:
        print(f"{'met' if each['met'] else 'MISSED'}: {each['claim']}: {each['shown']} ({each['bar']}); {each['beside']}")


if __name__ == "__main__":
    main()
