"""Time and error of many methods on the same attention calls; exact rows are computed once a call for all methods."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hyperattention.bench.call import BenchCall
from hyperattention.bench.candidates import Candidate
from hyperattention.bench.error import Error, pool
from hyperattention.bench.front import on_front
from hyperattention.bench.timing import Timing, ignore, interleave
from hyperattention.error.audit import report_on, sample_for
from hyperattention.error.judge import compare
from hyperattention.error.report import ErrorReport
from hyperattention.error.sampled_rows import measure_rows
from hyperattention.methods.base import Cost

# methods are compared on stretches of a call; a stretch is longer than a tile, because the rows of a tile share draws
_STRETCHES, _STRETCH_SIZE = 32, 128
_FIGURES = ("relative_error", "percentile_95_bound", "operator_error")


@dataclass(frozen=True)
class MeasureSettings:
    """The settings of the measurement.

    Args:
        audit_rows: rows of each output that are compared with exact attention.
        repeats: rounds of interleaved timing; an oracle is timed in one round.
        timed: number of timed calls, from the first on.
    """

    audit_rows: int = 256
    repeats: int = 3
    timed: int = 4


@dataclass(frozen=True)
class Point:
    """The results of one method at one budget on all calls.

    Args:
        candidate: the method and its budget.
        label: the name, with a remark if the method saved no pairs.
        approximated: whether the method listed fewer pairs than exact attention.
        cost: pairs listed, and dot products of the selection.
        timing: seconds of each round, summed over the timed calls.
        error: mean relative error over rows, heads and calls; 0 for exact attention, the reference of all errors.
        figures: for each figure of the audit, its value for each call and head: the mean relative error, the bound of
            its 95th percentile, the error in the paper's norm.
        interval: lower and upper ends of the error's 95% interval, for each call and head.
        pieces: the error averaged over heads, in each stretch of each call; methods are compared on these values.
        front: whether the point is on the Pareto front of time and error.
        calls: seed, layer and shapes of each call.
    """

    candidate: Candidate
    label: str
    approximated: bool
    cost: Cost
    timing: Timing
    error: Error
    figures: dict[str, tuple[tuple[float, ...], ...]]
    interval: tuple[tuple[tuple[float, ...], ...], ...]
    pieces: tuple[float, ...]
    front: bool
    calls: tuple[dict[str, object], ...]

    def overall(self, figure: str) -> float:
        """Average a figure of the audit over heads and calls."""
        return statistics.fmean(value for call in self.figures[figure] for value in call)

    @property
    def worst_head(self) -> float:
        """Largest error of any head in any call."""
        return max(max(call) for call in self.figures["relative_error"])

    def record(self) -> dict[str, object]:
        """Return all results as one record."""
        low, high = self.timing.quartiles
        return {
            "row": self.candidate.row.name, "family": self.candidate.family, "title": self.candidate.title,
            "label": self.label, "slots": self.candidate.slots, "exact": self.candidate.exact,
            "oracle": self.candidate.oracle,
            "method": repr(self.candidate.row.method), "approximated": self.approximated, "complete": self.cost.complete,
            "pairs_per_query": self.cost.pairs, "selection_pairs_per_query": self.cost.selection_pairs,
            "share_of_exact_pairs": self.cost.share_of_exact, "median_s": self.timing.median, "quartiles_s": (low, high),
            "seconds": self.timing.seconds, "error": self.error, "percentile_95": self.overall("percentile_95_bound"),
            "operator_error": self.overall("operator_error"), "error_by_head": self.figures["relative_error"],
            "interval_by_head": self.interval, "percentile_95_by_head": self.figures["percentile_95_bound"],
            "operator_error_by_head": self.figures["operator_error"], "front": self.front, "calls": self.calls,
        }  # fmt: skip


@dataclass(frozen=True)
class _Judged:
    """The audit of one output, and its error in each stretch."""

    figures: dict[str, tuple[float, ...]]  # one value for each head
    interval: tuple[tuple[float, ...], tuple[float, ...]]
    pieces: tuple[float, ...]
    report: ErrorReport | None = None


def steps_of(calls: Sequence[BenchCall], who: Sequence[Candidate], care: MeasureSettings) -> int:
    """Count the steps that `measure_frontier` reports."""
    return sum(len(calls) + min(care.timed, len(calls)) * _rounds(candidate, care) for candidate in who)


def _rounds(candidate: Candidate, care: MeasureSettings) -> int:
    # an oracle is slow, and no claim depends on its time
    return 1 if candidate.oracle else care.repeats


@torch.no_grad()
def measure_frontier(
    calls: Sequence[BenchCall], who: Sequence[Candidate], care: MeasureSettings, on_step: Callable[[str], None] = ignore
) -> tuple[Point, ...]:
    """Run every method on every call: first measure the errors on all calls, then the times on the first calls.

    The errors of all methods on a call are measured on the same rows, so only the methods cause differences.

    Args:
        calls: the calls.
        who: the methods; one must be exact attention.
        care: the settings of the measurement.
        on_step: called before each step with its name, `steps_of` times in total.

    Returns:
        a point for each method and budget, in order.

    Raises:
        ValueError: if there is no call, or exact attention is missing.
    """
    if not calls or not any(candidate.exact for candidate in who):
        raise ValueError(f"{len(calls)} calls and {len(who)} methods: give at least one call, and exact attention")
    judged: dict[str, list[_Judged]] = {candidate.row.name: [] for candidate in who}
    for call in calls:
        for name, found in _judge_all(call, who, care.audit_rows, on_step).items():
            judged[name].append(found)
    timings = _time_all(calls[: care.timed], who, care, on_step)
    exact = Error(0.0, 0.0, 0.0, care.audit_rows, len(calls))
    errors = {each.row.name: exact if each.exact else _pooled(judged[each.row.name]) for each in who}
    front = on_front([(timings[each.row.name].median, errors[each.row.name].mean) for each in who])
    return tuple(
        _point(each, calls, judged[each.row.name], timings[each.row.name], errors[each.row.name], kept)
        for each, kept in zip(who, front, strict=True)
    )


def _judge_all(call: BenchCall, who: Sequence[Candidate], rows: int, on_step: Callable[[str], None]) -> dict[str, _Judged]:
    # layers draw their rows independently, so that their errors can be pooled
    sample = sample_for(call.q, call.k, rows, is_causal=True, scale=call.scale, seed=call.seed * 1009 + call.layer)
    measured = measure_rows(call.q, call.k, call.v, None, sample)
    most = max(1, min(_STRETCHES, sample.num_queries // _STRETCH_SIZE, len(sample.index)))
    # a power of two, like the numbers of rows, so all pieces have the same size and their mean is the mean of all rows
    stretches = 1 << (most.bit_length() - 1)
    found = {}
    for candidate in who:
        on_step(f"{candidate.row.label}: error")
        out = call.answer(candidate)()
        if candidate.exact:
            # exact attention is the reference of all errors, so its error is 0 without a measurement
            none = (0.0,) * call.q.shape[1]
            found[candidate.row.name] = _Judged(dict.fromkeys(_FIGURES, none), (none, none), (0.0,) * stretches)
            continue
        judgement = compare(measured, out.index_select(2, sample.index))
        report = report_on(judgement, sample.num_queries, None)
        low, high = (tuple(end[0].tolist()) for end in report.interval)
        pieces = tuple(float(part.mean()) for part in judgement.errors[0].double().tensor_split(stretches, -1))
        figures = {name: tuple(getattr(report, name)[0].tolist()) for name in _FIGURES}
        found[candidate.row.name] = _Judged(figures, (low, high), pieces, report)
    return found


def _pooled(judged: Sequence[_Judged]) -> Error:
    error = pool([each.report for each in judged if each.report is not None])
    if error is None:
        raise ValueError("no call was audited, so there is no error to average: give at least one call")
    return error


def _time_all(
    calls: Sequence[BenchCall], who: Sequence[Candidate], care: MeasureSettings, on_step: Callable[[str], None]
) -> dict[str, Timing]:
    labels = {candidate.row.name: candidate.row.label for candidate in who}

    def announce(name: str) -> None:
        on_step(f"{labels[name]}: time")

    timings: dict[str, Timing] = {}
    for repeats in dict.fromkeys(_rounds(candidate, care) for candidate in who):
        some = [candidate for candidate in who if _rounds(candidate, care) == repeats]
        by_call = [interleave({each.row.name: call.answer(each) for each in some}, repeats, announce) for call in calls]
        for each in some:
            rounds = zip(*(found[each.row.name].seconds for found in by_call), strict=True)
            timings[each.row.name] = Timing(tuple(map(sum, rounds)))
    return timings


def _point(
    candidate: Candidate, calls: Sequence[BenchCall], judged: Sequence[_Judged], timing: Timing, error: Error, front: bool
) -> Point:
    length, head_dim = calls[0].q.shape[2:]
    return Point(
        candidate,
        candidate.row.label_for(length, True, len(calls)),
        candidate.row.approximates(length, True, len(calls)),
        candidate.row.method.cost(length, is_causal=True, head_dim=head_dim),
        timing,
        error,
        {name: tuple(each.figures[name] for each in judged) for name in _FIGURES},
        (tuple(each.interval[0] for each in judged), tuple(each.interval[1] for each in judged)),
        tuple(piece for each in judged for piece in each.pieces),
        front,
        tuple(call.described for call in calls),
    )
