"""Figures of attention by itself: speed, error on structured inputs, growth, and what the error bar costs."""

import statistics
from collections.abc import Iterable

from claims import Plan, Record, announce, at_least, at_most, pick, unbarred

from hyperattention.attention import attention
from hyperattention.bench.case import Case
from hyperattention.bench.error import pool
from hyperattention.bench.rows import Row, rows
from hyperattention.bench.speed import Speed, SpeedSettings, measure_speed
from hyperattention.bench.timing import interleave
from hyperattention.error.audit import audit
from hyperattention.methods.base import Cost
from hyperattention.methods.default import lean_method
from hyperattention.problem import Problem
from hyperattention.report.tables import format_error, format_memory


def errors_of(results: Iterable[Speed], name: str = "default") -> str:
    ours, control = pick(results, name), pick(results, "control")
    return (
        f"error {format_error(ours.error)}; control, the default's pairs: {format_error(control.error)}, "
        f"{control.ratio.value:.1f}x"
    )


def measure(case: Case, plan: Plan, repeats: int, *, published: bool = False) -> tuple[Speed, ...]:
    lines = [row for row in rows() if published or row.name != "published"]
    lines.append(Row("lean", "hyperattention, lean", lean_method(case.length)))
    return measure_speed(case, lines, SpeedSettings(repeats, plan.audit_rows, plan.memory), announce)


def speed_figure(claim: str, bar: float, case: Case, plan: Plan, repeats: int, *, published: bool = False) -> list[Record]:
    results = measure(case, plan, repeats, published=published)
    ours, lean = pick(results, "default"), pick(results, "lean")
    name = f"{claim}, {case.length:,} tokens, vs SDPA"
    records = [at_least(name, ours.ratio.value, bar, errors_of(results))]
    if lean.approximated:
        records.append(unbarred(f"{name}, `lean_method`", lean.ratio.value, errors_of(results, "lean")))
    if ours.memory_bytes is not None and case.length == plan.long:
        used = f"SDPA: {format_memory(results[0].memory_bytes)}"
        records.append(at_most(f"peak extra memory there, {claim}", ours.memory_bytes / 2**20, 1024, used, " MiB"))
    return [*records, *(speed.record(case) for speed in results)]


def causal_speed(plan: Plan) -> list[Record]:
    return speed_figure("causal forward", 6, Case(plan.medium), plan, plan.repeats, published=True)


def causal_speed_long(plan: Plan) -> list[Record]:
    return speed_figure("causal forward", 25, Case(plan.long), plan, plan.long_repeats)


def non_causal_speed_long(plan: Plan) -> list[Record]:
    return speed_figure("non-causal forward", 60, Case(plan.long, causal=False), plan, plan.long_repeats)


def backward_speed(plan: Plan) -> list[Record]:
    return speed_figure("causal forward + backward", 5, Case(plan.medium, backward=True), plan, plan.repeats)


def structured_error(plan: Plan) -> list[Record]:
    """Error against the control's at the same pairs, over heads from diffuse to sharp and three seeds."""
    records, pooled = [], {}
    lines = {row.name: row for row in rows() if row.name != "exact" and row.name != "published"}
    for name, row in lines.items():
        reports = []
        for seed in range(3):
            case = Case(plan.medium, heads=4, kv_heads=4, seed=seed)
            inputs = case.structured_inputs()
            out = case.call(row.method, inputs)()
            reports.append(audit(*inputs, out, rows=plan.audit_rows, is_causal=True, seed=seed, method=row.method))
            records.append(
                {"part": "error", "case": case, "row": name, "method": repr(row.method), "error": pool(reports[-1:]),
                 "error_by_head": reports[-1].relative_error, "interval_by_head": reports[-1].interval}
            )  # fmt: skip
        pooled[name] = pool(reports)
    ours, control = pooled["default"], pooled["control"]
    claim = f"error on structured inputs, {plan.medium:,} tokens, vs the control at the same pairs"
    beside = f"{format_error(ours)}; control {format_error(control)}; sinks + window {format_error(pooled['sinks_window'])}"
    return [at_most(claim, ours.mean / control.mean, 0.8, beside), *records]


def total(cost: Cost) -> float:
    return cost.pairs + cost.selection_pairs


def growth(plan: Plan) -> list[Record]:
    """Pairs listed, counted in the lists themselves, against length; and what choosing them costs."""
    method = next(row.method for row in rows() if row.name == "default")
    lengths = [plan.long // 16, plan.long // 8, plan.long // 4]
    records = []
    for length in lengths:
        q, k, v = Case(length).structured_inputs()
        selected = method.selections(Problem(q, k, v, q.shape[-1] ** -0.5, causal=True))
        # rows of each list, of all heads of a group, times the keys on it
        listed = sum(
            runs.first.shape[1] * runs.first.shape[2] * runs.size * selection.row_limit.shape[2]
            for _, selection in selected
            for runs in selection.runs
        )
        cost = method.cost(length)
        records.append({"part": "growth", "length": length, "listed": listed, "cost": cost, "method": repr(method)})
    counts = [record["listed"] for record in records]
    slopes = [(b - a) / (m - n) for a, b, n, m in zip(counts, counts[1:], lengths, lengths[1:], strict=False)]
    bend = max(slopes) / min(slopes) - 1
    long, longest = (method.cost(length) for length in (plan.long, plan.longest))
    beside = f"{statistics.fmean(slopes):,.0f} pairs listed for each further token"
    chosen = f"{long.selection_pairs:,.0f} products a query; exact attention scores {long.exact_pairs:,.0f}"
    return [
        at_most(f"kernel pairs: change of slope from {lengths[0]:,} to {lengths[-1]:,} tokens", 100 * bend, 1, beside, " %"),
        at_most(
            f"pairs a query, listed and scored to choose, at {plan.longest:,} tokens over those at {plan.long:,}",
            total(longest) / total(long),
            1.15,
            f"{total(long):,.0f} and {total(longest):,.0f} pairs a query",
        ),
        at_most(f"selection pairs at {plan.long:,} tokens", 100 * long.selection_pairs / long.exact_pairs, 10, chosen, " %"),
        *records,
    ]


def selection_at_length(plan: Plan) -> list[Record]:
    """What choosing costs beside the kernel at a million tokens, counted; what the method that costs least does there."""
    lean, usual = lean_method(plan.longest), next(row.method for row in rows() if row.name == "default")
    candidates = {"lean": lean, "default": usual, "control": next(row.method for row in rows() if row.name == "control")}
    case = Case(plan.longest)
    inputs = case.structured_inputs()
    calls = {name: case.call(method, inputs) for name, method in candidates.items()}
    errors = {
        name: pool(
            [audit(*inputs, call(), rows=plan.audit_rows // 4, is_causal=True, method=candidates[name], hardness=False)]
        )
        for name, call in calls.items()
    }
    times = interleave(calls, plan.long_repeats)
    records = [
        {"part": "length", "case": case, "row": name, "method": repr(method), "cost": method.cost(plan.longest),
         "cost_at_8_times_the_length": method.cost(8 * plan.longest), "error": errors[name],
         "median_s": times[name].median, "quartiles_s": times[name].quartiles}
        for name, method in candidates.items()
    ]  # fmt: skip
    cost, longer = lean.cost(plan.longest), lean.cost(8 * plan.longest)
    beside = "; ".join(
        f"{name}: {candidates[name].cost(plan.longest).selection_pairs:,.0f} products a query, error "
        f"{format_error(errors[name])}, {times[name].median / times['control'].median:.2f}x the control's time"
        for name in candidates
    )
    grows = f"{cost.selection_pairs:,.0f} products a query, and {longer.selection_pairs:,.0f} at {8 * plan.longest:,}"
    claim = f"selection pairs of the lean method at {plan.longest:,} tokens, relative to the kernel's"
    return [at_most(claim, 100 * cost.selection_pairs / cost.pairs, 10, f"{grows}; {beside}", " %"), *records]


def audit_cost(plan: Plan) -> list[Record]:
    """What the error bar costs: 64 audited rows, relative to the call they judge."""
    q, k, v = Case(plan.medium).structured_inputs()
    method = next(row.method for row in rows() if row.name == "default")
    out = attention(q, k, v, is_causal=True, method=method)
    calls = {
        "attention": lambda: attention(q, k, v, is_causal=True, method=method),
        "audit": lambda: audit(q, k, v, out, rows=64, is_causal=True, method=method),
    }
    times = interleave(calls, max(plan.repeats, 3))
    share = times["audit"].median / times["attention"].median
    beside = f"{1000 * times['audit'].median:.1f} ms beside {1000 * times['attention'].median:.0f} ms"
    records = [
        {"part": "time", "call": name, "length": plan.medium, "median_s": t.median, "quartiles_s": t.quartiles}
        for name, t in times.items()
    ]
    return [at_most(f"cost of auditing 64 rows at {plan.medium:,} tokens", 100 * share, 10, beside, " %"), *records]
