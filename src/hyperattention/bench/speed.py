"""Time, error and memory of several methods on one case, in one run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hyperattention.bench.case import Case
from hyperattention.bench.error import Error, pool
from hyperattention.bench.peak_memory import measure
from hyperattention.bench.rows import Row
from hyperattention.bench.timing import Ratio, Timing, ignore, interleave, speedup
from hyperattention.error.audit import audit
from hyperattention.methods.base import Cost
from hyperattention.methods.exact import Exact


@dataclass(frozen=True)
class SpeedSettings:
    """The settings of the measurement.

    Args:
        repeats: rounds of interleaved calls, after one warm-up round.
        audit_rows: rows of each output that are compared with exact attention.
        memory: whether to measure peak memory, in a separate process for each row.
    """

    repeats: int = 3
    audit_rows: int = 256
    memory: bool = True


@dataclass(frozen=True)
class Speed:
    """The results of one row on one case.

    Args:
        row: the row's name.
        label: the row's label, with a remark if exact attention ran.
        method: the method, as code.
        approximated: whether the method listed fewer pairs than exact attention.
        timing: seconds of each round.
        ratio: speed relative to torch's SDPA; above 1 is faster.
        error: measured error of the output; None for exact attention.
        cost: pairs listed, and dot products of the selection.
        memory_bytes: peak memory of one call beyond its inputs; None if not measured.
    """

    row: str
    label: str
    method: str
    approximated: bool
    timing: Timing
    ratio: Ratio
    error: Error | None
    cost: Cost
    memory_bytes: int | None

    def record(self, case: Case) -> dict[str, object]:
        """Return all results as one record."""
        low, high = self.timing.quartiles
        return {
            "case": case, "inputs": "structured", "row": self.row, "label": self.label, "method": self.method,
            "approximated": self.approximated, "median_s": self.timing.median, "quartiles_s": (low, high),
            "seconds": self.timing.seconds, "speedup": self.ratio, "error": self.error,
            "pairs_per_query": self.cost.pairs, "selection_pairs_per_query": self.cost.selection_pairs,
            "share_of_exact_pairs": self.cost.share_of_exact, "complete": self.cost.complete,
            "peak_memory_bytes": self.memory_bytes,
        }  # fmt: skip


def steps_of(rows: Sequence[Row], settings: SpeedSettings) -> int:
    """Count the steps that `measure_speed` reports."""
    return len(rows) * (1 + settings.repeats + settings.memory)


def measure_speed(
    case: Case, rows: Sequence[Row], settings: SpeedSettings, on_step: Callable[[str], None] = ignore
) -> tuple[Speed, ...]:
    """Measure every row on the same structured inputs: audit each output once, then time the rows alternately.

    Args:
        case: the case, which makes the inputs.
        rows: the rows to compare; the first must be exact attention, the base of all ratios.
        settings: the settings of the measurement.
        on_step: called before each step with its name, `steps_of` times in total.

    Returns:
        one result for each row.

    Raises:
        ValueError: if the first row is not exact attention.
    """
    if not isinstance(rows[0].method, Exact):
        raise ValueError(f"the first row runs {rows[0].method!r}: put exact attention first, the base of every ratio")
    inputs = case.structured_inputs()
    calls = {row.name: case.call(row.method, inputs) for row in rows}
    errors: dict[str, Error | None] = {}
    for row in rows:
        on_step(f"{row.label}: error")
        errors[row.name] = _error(case, row, inputs, calls[row.name], settings.audit_rows)
    labels = {row.name: row.label for row in rows}
    timings = interleave(calls, settings.repeats, lambda name: on_step(f"{labels[name]}: time"))
    results = []
    for row in rows:
        memory = None
        if settings.memory:
            on_step(f"{row.label}: memory")
            memory = measure(case, row.name, torch.get_num_threads())
        cost = row.method.cost(case.length, is_causal=case.causal, head_dim=case.head_dim)
        calls_approximated = 0 if isinstance(row.method, Exact) else 1
        results.append(
            Speed(
                row.name,
                row.label_for(case.length, case.causal, calls_approximated),
                repr(row.method),
                row.approximates(case.length, case.causal, calls_approximated),
                timings[row.name],
                speedup(timings[rows[0].name], timings[row.name]),
                errors[row.name],
                cost,
                memory,
            )
        )
    return tuple(results)


def _error(case: Case, row: Row, inputs, call: Callable, rows: int) -> Error | None:
    out = call().detach()
    # exact attention is the reference of all errors
    if not rows or isinstance(row.method, Exact):
        return None
    q, k, v = (x.detach() for x in inputs)
    shared = case.heads != case.kv_heads
    report = audit(q, k, v, out, rows=rows, is_causal=case.causal, enable_gqa=shared, seed=case.seed, method=row.method)
    return pool([report])
