"""Who is compared: torch's exact kernels, the method judged, its control at the same slots, FlexAttention with a window."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu.session import Session, reason_of
from gpu.tasks import Task, Tensors, make_tensors
from gpu.timing import Call, seconds_of
from hyperattention import Exact, Sinks, attention, default_method
from hyperattention.bench.rows import Row, control_of, find_default
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.method import Method

BACKENDS = {"exact_flash": SDPBackend.FLASH_ATTENTION, "exact_cudnn": SDPBackend.CUDNN_ATTENTION}
_PROBE = 256
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to compute a task: its call returns the output, and the gradients of q, k and v where they are taken."""

    name: str
    label: str
    call: Call
    method: str
    pairs: float
    share_of_pairs: float
    # on any q, k, v of the task's kind; None where only the call is of use
    attend: Attend | None = None
    exact: bool = False
    # called once, without warming up: a second call would take too much of the run
    costly: bool = False
    note: str = ""
    details: Callable[[], Mapping[str, object]] = dict

    @property
    def approximated(self) -> bool:
        return not self.exact and 0 < self.share_of_pairs < 1


@dataclass(frozen=True)
class Failure:
    """A candidate that cannot take part, and why."""

    name: str
    label: str
    reason: str


Entry = Candidate | Failure


def bind(attend: Attend, tensors: Tensors) -> Call:
    if tensors.grad_out is None:
        return lambda: (attend(*tensors.qkv),)

    def attend_and_return() -> tuple[Tensor, ...]:
        out = attend(*tensors.qkv)
        return (out.detach(), *torch.autograd.grad(out, tensors.qkv, tensors.grad_out))

    return attend_and_return


def sdpa(backend: SDPBackend, causal: bool, repeat: bool) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        if repeat and group > 1:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def _must_repeat(backend: SDPBackend, task: Task) -> bool:
    """Try a backend on the first tokens, sharing kv heads and then not; raise where it refuses both."""
    few = [x[:, :, :_PROBE].detach().requires_grad_(task.backward) for x in task.tensors.qkv]
    for repeat in (False, True):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                out = sdpa(backend, task.causal and task.queries == task.keys, repeat)(*few)
                if task.backward:
                    torch.autograd.grad(out, few, torch.ones_like(out))
                return repeat
            except Exception as error:
                # torch says in warnings which condition a backend misses
                why = " ".join([str(error), *(str(each.message) for each in told)])
    raise RuntimeError(why)


def _exact(name: str, task: Task, costly: bool) -> Entry:
    backend, label = BACKENDS[name], f"exact, SDPA {name.removeprefix('exact_')}"
    try:
        must = repeat = _must_repeat(backend, task)
    except Exception as error:
        return Failure(name, label, reason_of(error))
    tensors, note = task.tensors, "kv heads shared (enable_gqa)"
    group = tensors.q.shape[1] // tensors.k.shape[1]
    if repeat and task.backward:
        note = "kv heads repeated within the call"
    elif repeat:
        k, v = (x.repeat_interleave(group, 1) for x in (tensors.k, tensors.v))
        tensors, repeat, note = Tensors(tensors.kind, "", tensors.q, k, v), False, "kv heads repeated before the call"
    causal = task.causal and task.queries == task.keys
    return Candidate(
        name,
        label,
        bind(sdpa(backend, causal, repeat), tensors),
        f"scaled_dot_product_attention, {backend.name}",
        task.exact_pairs,
        1.0,
        sdpa(backend, causal, must),
        exact=True,
        costly=costly,
        note=note,
    )


def exact_candidates(task: Task, names: Sequence[str] = tuple(BACKENDS), *, costly: bool = False) -> list[Entry]:
    """Give torch's exact kernels on a task."""
    return [_exact(name, task, costly) for name in names]


def time_exact(session: Session) -> dict[str, float]:
    """Time the exact kernels that work here on a short causal task; the fastest first."""
    task = Task(make_tensors(session.plan, "gaussian", session.plan.probe))
    seconds = {}
    for each in exact_candidates(task):
        if isinstance(each, Candidate):
            seconds[each.name] = min(seconds_of(each.call, session.device) for _ in range(3))
    if not seconds:
        raise RuntimeError("no exact kernel of torch runs here: there is nothing to compare with")
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def candidate_of(session: Session, task: Task, name: str, label: str, method: AttentionMethod | None) -> Candidate:
    """Bind a method of ours to a task; None runs the default, which may be exact attention."""
    ran = default_method(task.keys, num_queries=task.queries, device=session.device) if method is None else method
    exact = isinstance(ran, Exact)
    cost = ran.cost(task.keys, is_causal=task.causal, head_dim=task.tensors.q.shape[3])
    pairs = task.exact_pairs if exact else cost.pairs
    if exact or task.queries == task.keys:
        label = Row(name, label, ran).label_for(task.keys, task.causal, 0 if exact else 1)
        label += " (exact ran)" if exact and "exact" not in label else ""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(
            q,
            k,
            v,
            is_causal=task.causal,
            enable_gqa=q.shape[1] != k.shape[1],
            method=method,
            seed=session.plan.seed,
            causal_align=task.causal_align,
        )
        if not isinstance(out, Tensor):
            raise TypeError("attention was asked for its output alone and returned more")
        return out

    written = repr(ran) if method is not None else f"None: {ran!r}"
    share = pairs / task.exact_pairs
    return Candidate(name, label, bind(attend, task.tensors), written, pairs, share, attend, exact)


def our_candidates(session: Session, task: Task) -> list[Entry]:
    """Give the method judged, and the control that lists as many slots: sinks, window and uniform draws."""
    method = session.plan.method
    label = "hyperattention, default" if method == find_default() else "hyperattention, as given"
    return [
        candidate_of(session, task, "ours", label, method),
        candidate_of(session, task, "control", "control: + uniform draws", control_of(method)),
    ]


def sinks_and_slots(method: Method) -> tuple[int, int]:
    sinks = sum(stage.num for stage in method.stages if isinstance(stage, Sinks))
    return sinks, round(method.cost(2**30).pairs)
