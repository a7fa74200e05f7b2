"""Measure candidates on one task in one run: memory and error once, then times in turn; ratios to the fastest exact."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu.candidates import Candidate, Entry, Failure
from gpu.roofline import floor_seconds
from gpu.session import Record, Session, forget, reason_of
from gpu.tasks import Task
from gpu.timing import Outputs, Trial, calls_in_sample, interleave, ratio_of, try_out
from hyperattention.bench.error import Error, pool
from hyperattention.bench.timing import Timing
from hyperattention.error.audit import audit

# part of the time left that the rounds of one comparison may take
_SHARE_OF_TIME = 0.3


@dataclass(frozen=True)
class Scene:
    """What is compared, for the record, and how an output is judged.

    Args:
        shape: sizes of the inputs.
        inputs: their kind.
        note: how they were made.
        judge: gives the error of a candidate's outputs, by its name, or None where there is nothing to judge.
        floor: gives the seconds below which no call with so many pairs can be, or None.
    """

    shape: Record
    inputs: str
    note: str
    judge: Callable[[str, Outputs], Error | None]
    floor: Callable[[float], float | None]


@dataclass(frozen=True)
class Measured:
    """What was found of one candidate before times are taken in turn."""

    candidate: Candidate
    seconds: float
    calls: int
    memory_bytes: int | None
    error: Error | None
    error_failed: str | None
    gradients: Outputs


def scene_of(session: Session, task: Task) -> Scene:
    """Judge a task by an audit of its output, and hold its forward pass against the roofline."""
    q, k, v = (x.detach() for x in task.tensors.qkv)

    def judge(_: str, outputs: Outputs) -> Error | None:
        if not outputs:
            return None
        report = audit(
            q,
            k,
            v,
            outputs[0],
            rows=session.plan.audit_rows,
            is_causal=task.causal,
            enable_gqa=q.shape[1] != k.shape[1],
            causal_align=task.causal_align,
            seed=session.plan.seed,
        )
        return pool([report])

    def floor(pairs: float) -> float | None:
        # the bytes of the whole cache are no floor for one query that reads a part of it
        if session.ceilings is None or not pairs or task.backward or task.queries != task.keys:
            return None
        return floor_seconds(session.ceilings, q, k, v, pairs)

    return Scene(task.shape(), task.tensors.kind, task.tensors.note, judge, floor)


def compare(session: Session, part: str, scene: Scene, entries: Sequence[Entry]) -> Record:
    """Measure all entries; those that fail are recorded with their reason."""
    failed = [each for each in entries if isinstance(each, Failure)]
    found: list[Measured] = []
    for each in entries:
        if isinstance(each, Candidate):
            result = _measure_once(session, scene, each)
            (failed if isinstance(result, Failure) else found).append(result)
            forget()
    timings = _time_in_turn(session, found)
    reference = min(
        (each.candidate.name for each in found if each.candidate.name.startswith("exact")),
        key=lambda name: timings[name].median,
        default=None,
    )
    base = None if reference is None else timings[reference]
    lines = [_line(each, scene, timings[each.candidate.name], base) for each in found]
    lines += [{"name": each.name, "label": each.label, "failed": each.reason} for each in failed]
    ours = next((line for line in lines if line["name"] == "ours" and not line.get("failed")), None)
    return {
        "part": part, "shape": scene.shape, "inputs": scene.inputs, "inputs_note": scene.note, "reference": reference,
        "ratio": ours and ours["speedup"], "ceilings": session.ceilings, "contenders": lines,
        "gradient_error": _gradient_errors(found),
    }  # fmt: skip


def _measure_once(session: Session, scene: Scene, candidate: Candidate) -> Measured | Failure:
    try:
        if not candidate.costly:
            candidate.call()
        trial: Trial = try_out(candidate.call, session.device)
    except Exception as error:
        print(f"  {candidate.name} failed: {reason_of(error)}", flush=True)
        return Failure(candidate.name, candidate.label, reason_of(error))
    error = why = None
    try:
        error = scene.judge(candidate.name, trial.outputs)
    except Exception as caught:
        why = reason_of(caught)
    calls = 1 if candidate.costly else calls_in_sample(trial.seconds, session.device)
    return Measured(candidate, trial.seconds, calls, trial.memory_bytes, error, why, trial.outputs[1:])


def _time_in_turn(session: Session, found: Sequence[Measured]) -> dict[str, Timing]:
    once = {each.candidate.name: Timing((each.seconds,)) for each in found if each.candidate.costly}
    calls = {each.candidate.name: (each.candidate.call, each.calls) for each in found if not each.candidate.costly}
    each_round = sum(each.seconds * each.calls for each in found if not each.candidate.costly)
    rounds = max(1, min(session.plan.rounds, int(_SHARE_OF_TIME * session.clock.left / max(each_round, 1e-6))))
    return once | interleave(calls, rounds, session.device)


def _line(each: Measured, scene: Scene, timing: Timing, base: Timing | None) -> Record:
    candidate, floor = each.candidate, scene.floor(each.candidate.pairs)
    return {
        "name": candidate.name, "label": candidate.label, "method": candidate.method, "exact": candidate.exact,
        "approximated": candidate.approximated, "pairs_per_query": candidate.pairs,
        "share_of_exact_pairs": candidate.share_of_pairs, "rounds": len(timing.seconds), "calls_in_sample": each.calls,
        "warmed_up": not candidate.costly,
        "median_s": timing.median, "quartiles_s": timing.quartiles, "seconds": timing.seconds,
        "speedup": None if base is None else ratio_of(base, timing), "error": each.error, "error_failed": each.error_failed,
        "peak_memory_bytes": each.memory_bytes, "floor_s": floor, "over_floor": floor and timing.median / floor,
        "note": candidate.note, **candidate.details(),
    }  # fmt: skip


def _gradient_errors(found: Sequence[Measured]) -> Record | None:
    """Relative L2 difference of each gradient to that of the first exact kernel."""
    exact = next((each for each in found if each.candidate.exact and each.gradients), None)
    if exact is None:
        return None
    errors: Record = {"against": exact.candidate.name}
    for each in found:
        if each is not exact and len(each.gradients) == len(exact.gradients):
            pairs = zip("qkv", each.gradients, exact.gradients, strict=True)
            errors[each.candidate.name] = {name: relative(ours, theirs) for name, ours, theirs in pairs}
    return errors


def relative(ours: Tensor, theirs: Tensor) -> float:
    # a head at a time: float32 copies of all would not fit beside the rest
    parts = [(a.float() - b.float(), b.float()) for a, b in zip(ours.unbind(1), theirs.unbind(1), strict=True)]
    miss, size = (sum(float(torch.linalg.vector_norm(x[i])) ** 2 for x in parts) for i in (0, 1))
    return (miss / size) ** 0.5 if size else float(miss > 0)
