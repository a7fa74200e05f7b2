"""Measure what a tolerance promises: calls within it, what they spend, and what deciding costs beside an oracle.

    python benchmarks/tolerance.py                                    # 200 cases and the oracle: about ten minutes
    python benchmarks/tolerance.py --toy --out /tmp/toy               # short inputs, to see that the script runs
    python benchmarks/tolerance.py --structured 2 --documents 1 --oracle-length 0 --out /tmp/few

Cases are structured inputs of different seeds, and calls of the reference model on held-out documents. Each is judged on
all its rows by one exact pass, for every tolerance. Lines of part "figure" are what is claimed, the others what it rests on.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from claims import Record, at_most, figure
from torch import Tensor

from hyperattention.attention import attention, measured_attention
from hyperattention.bench.case import Case
from hyperattention.bench.rows import rows
from hyperattention.bench.timing import interleave
from hyperattention.error.tolerance.ladder import default_ladder
from hyperattention.error.tolerance.report import ToleranceReport
from hyperattention.files.records import write_records
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.exact import Exact
from hyperattention.reference.model import load_reference
from hyperattention.reference.passes import capture
from hyperattention.reference.samples import samples_of_documents
from hyperattention.reference.text import held_out_documents

TOLERANCES = (0.1, 0.05, 0.02, 0.01)
HEADS, KV_HEADS = 4, 2


@dataclass(frozen=True)
class Inputs:
    """One call: its name, its tensors, and what else attention is told."""

    name: str
    tensors: tuple[Tensor, Tensor, Tensor]
    options: dict

    def attend(self, method: AttentionMethod) -> Tensor:
        return attention(*self.tensors, is_causal=True, enable_gqa=True, method=method, **self.options)

    def within(self, tolerance: float) -> tuple[Tensor, ToleranceReport]:
        result = measured_attention(*self.tensors, is_causal=True, enable_gqa=True, tolerance=tolerance, **self.options)
        assert result.tolerance is not None  # it was given
        return result.out, result.tolerance

    def by_head(self, methods: tuple[AttentionMethod, ...]) -> Callable[[], object]:
        """Bind the methods run directly, heads of one together; exact heads by torch's own kernel, as within a call."""
        q, k, v = self.tensors
        group, parts = q.shape[1] // k.shape[1], []
        for method, heads in ByHead(methods).groups().items():
            rows = [head * group + member for head in heads for member in range(group)]
            tensors = (q, k, v) if len(heads) == k.shape[1] else (q[:, rows], k[:, heads], v[:, heads])
            parts.append((method, Inputs(self.name, tensors, self.options)))
        return lambda: [part.attend(method) for method, part in parts]


def mean_errors(out: Tensor, exact: Tensor) -> Tensor:
    """The mean relative error over all rows of each head."""
    return (torch.linalg.vector_norm(out - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)).mean(-1)


def structured_cases(count: int, length: int) -> Iterator[Inputs]:
    for seed in range(count):
        yield Inputs("structured", Case(length, HEADS, KV_HEADS, seed=seed).structured_inputs(), {"seed": seed})


def captured_cases(documents: int, length: int) -> Iterator[Inputs]:
    if not documents:
        return
    loaded = load_reference()
    samples = samples_of_documents(held_out_documents(length, documents))
    exact = next(row for row in rows() if row.name == "exact")
    for number, sample in enumerate(samples):
        for call in capture(loaded, sample, exact):
            options = {"seed": number, "layer": call.layer, "scale": call.scale}
            yield Inputs("captured", (call.q, call.k, call.v), options)


def judge_case(number: int, case: Inputs) -> Iterator[Record]:
    exact = case.attend(Exact())
    for tolerance in TOLERANCES:
        out, report = case.within(tolerance)
        errors = mean_errors(out, exact)
        yield {
            "part": "case", "inputs": case.name, "number": number, "length": exact.shape[2], "tolerance": tolerance,
            "options": case.options, "within": bool((errors <= tolerance).all()), "errors": errors, "bound": report.bound,
            "bounds_hold": bool((errors <= report.bound + torch.finfo(errors.dtype).eps).all()),
            "share_of_pairs": report.share_of_pairs, "exact_heads": len(report.exact_heads) / len(report.methods),
            "num_rows": report.num_rows, "methods": [repr(method) for method in report.methods], "note": report.note,
        }  # fmt: skip


def summarise(records: list[Record]) -> list[Record]:
    figures = []
    for tolerance in TOLERANCES:
        cases = [record for record in records if record["tolerance"] == tolerance]
        mean = {
            name: statistics.fmean(float(record[name]) for record in cases)  # type: ignore[arg-type]
            for name in ("within", "bounds_hold", "share_of_pairs", "exact_heads")
        }
        spent = f"{mean['share_of_pairs']:.2f} of exact's pairs, {mean['exact_heads']:.0%} of kv heads exactly"
        held = f"all bounds held in {mean['bounds_hold']:.1%}"
        figures.append(
            figure(
                f"calls within tolerance {tolerance:g}, of {len(cases)}",
                ">= 95 %",
                mean["within"],
                mean["within"] >= 0.95,
                f"{mean['within']:.1%}",
                f"{held}; {spent}",
            )
        )
        if tolerance == max(TOLERANCES):
            shares = []
            for name in sorted({str(record["inputs"]) for record in cases}):
                own = [float(record["share_of_pairs"]) for record in cases if record["inputs"] == name]  # type: ignore[arg-type]
                shares.append(f"{name} {statistics.fmean(own):.2f}")
            figures.append(at_most(f"pairs at tolerance {tolerance:g}", mean["share_of_pairs"], 0.6, ", ".join(shares)))
    return figures


def cheapest_methods(case: Inputs, tolerances: tuple[float, ...]) -> dict[float, tuple[AttentionMethod, ...]]:
    """What an oracle would run: for each kv head the cheapest rung whose true mean error is within the tolerance."""
    key, exact = case.tensors[1], case.attend(Exact())
    ladder, length, kv_heads = default_ladder(key.shape[2]), key.shape[2], key.shape[1]
    found: dict[float, list[AttentionMethod]] = {tolerance: [Exact()] * kv_heads for tolerance in tolerances}
    for rung in reversed(ladder.rungs):
        cost = rung.cost(length)
        if cost.pairs + cost.selection_pairs > ladder.worth * cost.exact_pairs:
            continue
        worst = mean_errors(case.attend(rung), exact).unflatten(1, (kv_heads, -1)).amax((0, 2))
        for tolerance, methods in found.items():
            for head in range(kv_heads):
                # from dear to cheap: one that fails ends the descent of its head, in all that is cheaper
                if worst[head] <= tolerance:
                    methods[head] = rung
    return {tolerance: tuple(methods) for tolerance, methods in found.items()}


def measure_overhead(length: int, repeats: int, tolerances: tuple[float, ...]) -> list[Record]:
    """Time a call against the methods it chose, run directly, and against the cheapest that are truly within."""
    case, records = Inputs("structured", Case(length, HEADS, KV_HEADS).structured_inputs(), {"seed": 0}), []
    oracles = cheapest_methods(case, tolerances)
    for tolerance in tolerances:
        _, report = case.within(tolerance)
        calls: dict[str, Callable[[], object]] = {
            "tolerance": lambda tolerance=tolerance: case.within(tolerance),
            "chosen": case.by_head(report.methods),
            "oracle": case.by_head(oracles[tolerance]),
        }
        times = interleave(calls, repeats)
        medians = {name: timing.median for name, timing in times.items()}
        over = {name: 100 * (medians["tolerance"] / medians[name] - 1) for name in ("chosen", "oracle")}
        beside = f"{over['oracle']:.0f} % against the cheapest rungs truly within; {report}".replace("\n", "; ")
        claim = f"cost of deciding, tolerance {tolerance:g}, {length:,} tokens, against its own rungs run directly"
        records += [
            at_most(claim, over["chosen"], 25, beside, " %"),
            {"part": "overhead", "length": length, "tolerance": tolerance, "median_s": medians,
             "quartiles_s": {name: timing.quartiles for name, timing in times.items()}, "over_percent": over,
             "chosen": [repr(method) for method in report.methods], "share_of_pairs": report.share_of_pairs,
             "oracle": [repr(method) for method in oracles[tolerance]]},
        ]  # fmt: skip
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structured", type=int, default=120, help="structured inputs, one a seed")
    parser.add_argument("--documents", type=int, default=20, help="documents of the reference model, four calls each")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the structured inputs")
    parser.add_argument("--document-length", type=int, default=8192, help="bytes of a document of the reference model")
    parser.add_argument("--oracle-length", type=int, default=32768, help="tokens of the comparison with an oracle; 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records", help="folder of the record")
    parser.add_argument("--toy", action="store_true", help="short inputs, to see that the script runs; says nothing")
    args = parser.parse_args()
    if args.toy:
        if args.out == parser.get_default("out"):
            parser.error("--toy measures nothing worth committing: name another folder with --out")
        args.structured, args.documents, args.repeats = 1, 1, 1
        args.length, args.document_length, args.oracle_length = 4096, 4096, 4096
    torch.set_num_threads(args.threads)
    records: list[Record] = []
    with torch.no_grad():
        for source in (
            structured_cases(args.structured, args.length),
            captured_cases(args.documents, args.document_length),
        ):
            for number, case in enumerate(source):
                records += judge_case(number, case)
                print("   ", case.name, number + 1, flush=True)
        figures = summarise(records) if records else []
        if args.oracle_length:
            records += measure_overhead(args.oracle_length, args.repeats, TOLERANCES[:2])
    records = [*figures, *records]
    write_records(args.out / "tolerance.jsonl", records, kind="tolerance")
    for record in records:
        if record["part"] == "figure":
            verdict = "met" if record["met"] else "MISSED"
            print(f"  {verdict}: {record['claim']}: {record['shown']} ({record['bar']}); {record['beside']}")


if __name__ == "__main__":
    main()
