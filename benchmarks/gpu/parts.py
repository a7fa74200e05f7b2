"""The parts of the GPU benchmark on attention by itself: each measures, writes its records, and returns nothing."""

from dataclasses import replace

import torch

from gpu.candidates import Candidate, Entry, candidate_of, exact_candidates, our_candidates, time_exact
from gpu.compare import compare, scene_of
from gpu.flex import flex_candidate
from gpu.peer import peer_candidates
from gpu.session import Record, Session
from gpu.tasks import KINDS, Task, make_decode_tensors, make_long_tensors, make_tensors
from gpu.timing import Call, Outputs
from hyperattention.bench.rows import control_of
from hyperattention.error.audit import audit as judge
from hyperattention.problem import Problem

# time of a part beside its calls of exact attention: making inputs, audits, kernels built
_BESIDE_SECONDS = 30.0
# calls of exact attention that take longer are made once
_COSTLY_SECONDS = 5.0


def measure(session: Session, part: str, task: Task, others: list[Entry] | None = None) -> None:
    """Compare the exact kernels, the method judged, its control and others on one task."""
    entries = [*exact_candidates(task), *our_candidates(session, task), *(others or ())]
    session.journal.write(compare(session, part, scene_of(session, task), entries))


def forward(session: Session) -> None:
    """Forward passes: causal and not at the length of the bars, causal at shorter ones."""
    plan = session.plan
    lengths = [(plan.long, True), (plan.long, False), *((length, True) for length in plan.shorter)]
    for length, causal in lengths:
        for kind in KINDS:
            measure(session, "forward", Task(make_tensors(plan, kind, length), causal))


def backward(session: Session) -> None:
    """Forward and backward, with a gradient for q, k and v."""
    for kind in KINDS:
        tensors = make_tensors(session.plan, kind, session.plan.long).with_gradients(session.plan.seed)
        measure(session, "backward", Task(tensors))


def crossover(session: Session) -> None:
    """Short lengths, to see from which on the method is faster than exact attention."""
    for length in session.plan.crossover:
        for kind in KINDS:
            measure(session, "crossover", Task(make_tensors(session.plan, kind, length)))


def long(session: Session) -> None:
    """The longest length: all heads on structured inputs if time and memory allow, one kv head on Gaussian ones."""
    plan = session.plan
    seconds = time_exact(session)
    whole = next(iter(seconds.values())) * (plan.longest / plan.probe) ** 2
    choices = {kind: [1] for kind in KINDS}
    if whole + _BESIDE_SECONDS < session.clock.left:
        choices["structured"].insert(0, plan.kv_heads)
    for kind, kv_heads in choices.items():
        # fewer heads, or the next kernel, where the first choice fails
        attempts = ((count, name) for count in kv_heads for name in seconds)
        for count, name in attempts:
            if _measure_long(session, kind, count, name, whole * count / plan.kv_heads):
                break


def _measure_long(session: Session, kind: str, kv_heads: int, exact: str, expected: float) -> bool:
    """Compare on some kv heads, all candidates on the same; tell whether exact attention and the method judged ran."""
    plan = session.plan
    costly = expected > _COSTLY_SECONDS
    task = Task(make_long_tensors(plan, kind, plan.longest, kv_heads))
    entries = [*exact_candidates(task, [exact], costly=costly), *our_candidates(session, task)]
    record = compare(session, "long", scene_of(session, task), entries)
    heads = f"all {plan.heads} heads" if kv_heads == plan.kv_heads else f"{task.tensors.q.shape[1]} of {plan.heads} heads"
    note = f"{heads} for every candidate, nothing extrapolated"
    note += ", exact attention timed once without warming up" if costly else ""
    session.journal.write(record | {"heads_note": note})
    return record["ratio"] is not None


def flex(session: Session) -> None:
    """FlexAttention with sinks and a window beside the others."""
    for kind in KINDS:
        task = Task(make_tensors(session.plan, kind, session.plan.long))
        fastest = next(iter(time_exact(session)))
        entries = [*exact_candidates(task, [fastest]), *our_candidates(session, task), flex_candidate(session, task)]
        session.journal.write(compare(session, "flex", scene_of(session, task), entries))


def peer(session: Session) -> None:
    """Published HyperAttention's own code on the same inputs."""
    for kind in KINDS:
        task = Task(make_tensors(session.plan, kind, session.plan.long))
        fastest = next(iter(time_exact(session)))
        entries = [*exact_candidates(task, [fastest]), *our_candidates(session, task), *peer_candidates(session, task)]
        session.journal.write(compare(session, "peer", scene_of(session, task), entries))


def decode(session: Session) -> None:
    """One query a sequence over a long cache: the default, which is exact there, and methods asked for by name."""
    plan = session.plan
    cases = [("structured", batch) for batch in plan.batches] + [("gaussian", plan.batches[0])]
    for kind, batch in cases:
        task = Task(make_decode_tensors(plan, kind, batch), causal_align="lower_right")
        default = candidate_of(session, task, "default", "hyperattention, no method named", None)
        measure(session, "decode", task, [default])


def audit(session: Session) -> None:
    """What the error bar costs: 64 audited rows a head, relative to the call they judge."""
    task = Task(make_tensors(session.plan, "structured", session.plan.long))
    q, k, v = task.tensors.qkv
    ours, control = our_candidates(session, task)
    if not isinstance(ours, Candidate):
        raise RuntimeError(ours.reason)
    (out,) = ours.call()

    options = {"rows": 64, "is_causal": True, "enable_gqa": q.shape[1] != k.shape[1], "seed": session.plan.seed}
    entries: list[Entry] = [ours, control]
    for name, label, hardness in (
        ("audit", "audit of 64 rows a head, the error alone", False),
        ("full_audit", "audit of 64 rows a head, with alpha, kappa and the paper's norm", True),
    ):

        def call(hardness=hardness) -> Outputs:
            judge(q, k, v, out, **options, hardness=hardness)
            return ()

        entries.append(_part_of(ours, name, label, f"audit(rows=64, hardness={hardness})", call))
    session.journal.write(_share(compare(session, "audit", scene_of(session, task), entries), "audit"))


def selection(session: Session) -> None:
    """What choosing keys costs: the lists alone, relative to the whole call."""
    task, method = Task(make_tensors(session.plan, "structured", session.plan.long)), session.plan.method
    problem = Problem(*task.tensors.qkv, session.plan.head_dim**-0.5, causal=True, seed=session.plan.seed)
    ours, control = our_candidates(session, task)
    if not isinstance(ours, Candidate):
        raise RuntimeError(ours.reason)
    entries: list[Entry] = [ours, control]
    for name, chosen in (("selection", method), ("control_selection", control_of(method))):

        def call(chosen=chosen) -> Outputs:
            with torch.no_grad():
                chosen.selections(problem)
            return ()

        entries.append(_part_of(ours, name, f"{name.replace('_', ' ')} alone", f"{chosen!r}.selections", call))
    session.journal.write(_share(compare(session, "selection", scene_of(session, task), entries), "selection"))


def _part_of(whole: Candidate, name: str, label: str, method: str, call: Call) -> Candidate:
    """Time what is no attention by itself: it lists no pairs and gives no output to judge."""
    return replace(whole, name=name, label=label, call=call, method=method, pairs=0.0, share_of_pairs=0.0, attend=None)


def _share(record: Record, name: str) -> Record:
    """Add the time of one candidate relative to the call it belongs to."""
    medians = {each["name"]: each["median_s"] for each in record["contenders"] if not each.get("failed")}
    return record | {"share": medians[name] / medians["ours"] if {name, "ours"} <= set(medians) else None}
