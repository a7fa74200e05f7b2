"""Figures on the reference model: loss, retrieval and its gate, and error and time on its own queries, keys and values."""

from collections.abc import Callable

from claims import Plan, Record, announce, at_most, figure, pick

from hyperattention.attention import attention
from hyperattention.bench.error import pool
from hyperattention.bench.rows import Row, rows
from hyperattention.bench.timing import Timing, interleave
from hyperattention.error.audit import audit
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.reference.evaluate import ModelJudgement, evaluate
from hyperattention.reference.model import load_reference
from hyperattention.reference.passes import capture
from hyperattention.reference.samples import samples_of_documents
from hyperattention.reference.text import held_out_documents
from hyperattention.report.demo import judgement_record
from hyperattention.report.tables import format_added, format_error
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window

# the gate is a property of the model: its window stays what it is when the default method changes
GATE = (Row("exact", "exact (SDPA)", Exact()), Row("sinks_window", "sinks + window", Method(Sinks(16), Window(256))))


def judged_samples(plan: Plan, count: int):
    loaded = load_reference(plan.reference)
    length = plan.loaded or loaded.max_length
    return loaded, samples_of_documents(held_out_documents(length, count)), length


def reference_error(plan: Plan) -> list[Record]:
    """Error and time on the reference model's own queries, keys and values, layer by layer."""
    loaded, samples, length = judged_samples(plan, plan.captured)
    lines = [row for row in rows() if row.name != "published"]
    calls = [call for sample in samples for call in capture(loaded, sample, lines[0])]
    reports: dict[str, list] = {row.name: [] for row in lines}
    rounds: dict[str, list[Timing]] = {row.name: [] for row in lines}
    for number, call in enumerate(calls):
        print("    call", number + 1, "of", len(calls), flush=True)
        shared = {"is_causal": True, "scale": call.scale, "enable_gqa": call.q.shape[1] != call.k.shape[1]}

        def bind(row: Row, call=call, shared=shared) -> Callable[[], object]:
            return lambda: attention(call.q, call.k, call.v, method=row.method, layer=call.layer, **shared)

        bind(lines[0])()
        for row in lines[1:]:
            out = bind(row)()
            reports[row.name].append(
                audit(call.q, call.k, call.v, out, rows=plan.audit_rows, seed=number, method=row.method, **shared)
            )
        for name, timing in interleave({row.name: bind(row) for row in lines}, plan.repeats).items():
            rounds[name].append(timing)
    seconds = {name: sum(timing.median for timing in timings) for name, timings in rounds.items()}
    errors = {name: pool(found) for name, found in reports.items()}
    records = [
        {"part": "calls", "length": length, "row": row.name, "method": repr(row.method), "error": errors[row.name],
         "median_s": seconds[row.name], "quartiles_s": [timing.quartiles for timing in rounds[row.name]],
         "error_by_call": [report.relative_error for report in reports[row.name]]}
        for row in lines
    ]  # fmt: skip
    ours, control = errors["default"], errors["control"]
    where = f"the reference model's own q, k, v, {length:,} tokens"
    beside = (
        f"{format_error(ours)}; control {format_error(control)}; {seconds['exact'] / seconds['default']:.2f}x SDPA's speed"
    )
    return [
        at_most(f"error on {where}, vs the control at the same pairs", ours.mean / control.mean, 0.8, beside),
        at_most(f"time on {where}, vs the control", seconds["default"] / seconds["control"], 1.25, beside),
        *records,
    ]


def reference_gate(plan: Plan) -> list[Record]:
    """The gate of the model: far keys matter to its loss, and exact attention finds answers at every distance."""
    loaded, samples, length = judged_samples(plan, plan.gate_documents)
    exact, dropped = results = evaluate(loaded, samples, GATE, audit_rows=0, on_step=announce)
    shared = {"length": length, "documents": len(samples), "seed": 0}
    return [*gate_figures(exact, dropped, length), *(shared | judgement_record(each) for each in results)]


def gate_figures(exact: ModelJudgement, dropped: ModelJudgement, length: int) -> list[Record]:
    gap, planted = (getattr(dropped, name) - getattr(exact, name) for name in ("bits_per_byte", "bits_with_planted"))
    # a range of distances without answers has shown nothing
    least = min(depth.share or 0.0 for depth in exact.depths)
    beside = f"{planted:.3f} with planted lines; {dropped.retrieval:.1%} of digits retrieved (exact {exact.retrieval:.1%})"
    where = f"gate, {length:,} bytes"
    return [
        figure(f"{where}: exact beats sinks + window", ">= 0.05 bits a byte", gap, gap >= 0.05, f"{gap:.3f} bits", beside),
        figure(
            f"{where}: exact retrieval at every depth",
            ">= 90 %, >= 400 answers",
            least,
            least >= 0.9 and exact.answers >= 400,
            f"{least:.1%}",
            f"{exact.answers} answers in {len(exact.depths)} ranges of distance",
        ),
    ]


def reference_loss(plan: Plan) -> list[Record]:
    """Loss and retrieval with all layers replaced; `reference_gate` makes them mean something."""
    loaded, samples, length = judged_samples(plan, plan.documents)
    results = evaluate(loaded, samples, rows(), on_step=announce)
    exact, dropped, ours = (pick(results, name) for name in ("exact", "sinks_window", "default"))
    shared = {"length": length, "documents": len(samples), "seed": 0}
    return [*loss_figures(exact, dropped, ours, length), *(shared | judgement_record(each) for each in results)]


def loss_figures(exact: ModelJudgement, dropped: ModelJudgement, ours: ModelJudgement, length: int) -> list[Record]:
    fewer = 1 / ours.cost.share_of_exact
    where = f"all layers replaced, {length:,} bytes, {fewer:.1f}x fewer pairs"
    points = 100 * (exact.retrieval - ours.retrieval)
    table = (f"{each.label} {format_added(each)}, {each.retrieval:.1%}" for each in (dropped, ours))
    added = figure(
        f"added loss, {where}",
        "<= 0.02 nats a byte at >= 4x fewer pairs",
        ours.added_nats,
        ours.added_nats <= 0.02 and fewer >= 4,
        f"{format_added(ours)} nats",
        f"error {format_error(ours.error)}",
    )
    share = ours.added_nats / dropped.added_nats if dropped.added_nats > 0 else float("inf")
    return [
        added,
        at_most("added loss relative to that of the same sinks + window alone", 100 * share, 25, "; ".join(table), " %"),
        at_most("retrieval lost", points, 5, f"exact {exact.retrieval:.1%}, default {ours.retrieval:.1%}", " points"),
    ]
