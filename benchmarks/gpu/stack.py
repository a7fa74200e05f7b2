"""Prefill of an 8B-shaped stack of layers, end to end: what faster attention is worth beside projections and MLPs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from gpu.candidates import Attend, Candidate, Entry, exact_candidates, our_candidates, time_exact
from gpu.compare import Scene, compare, relative
from gpu.session import Record, Session
from gpu.tasks import Task, Tensors
from gpu.timing import Outputs, Stopwatch
from hyperattention.bench.error import Error, pool
from hyperattention.error.audit import audit

NOTE = "random weights and hidden states: times are a model's, errors are not"


class Layer(nn.Module):
    """One decoder layer with the shapes of Llama-3-8B: norms without weights, which change no time."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        plan = session.plan
        where = {"bias": False, "device": session.device, "dtype": plan.dtype}
        self.sizes = (plan.heads, plan.kv_heads, plan.kv_heads)
        self.head_dim, self.mlp_chunk = plan.head_dim, plan.mlp_chunk
        self.qkv = nn.ModuleList(nn.Linear(plan.hidden, heads * plan.head_dim, **where) for heads in self.sizes)
        self.o = nn.Linear(plan.heads * plan.head_dim, plan.hidden, **where)
        self.gate, self.up = (nn.Linear(plan.hidden, plan.mlp, **where) for _ in range(2))
        self.down = nn.Linear(plan.mlp, plan.hidden, **where)
        self.requires_grad_(False)

    def project(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = rms_norm(x, x.shape[-1:])
        q, k, v = (
            project(normed).unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
            for project, heads in zip(self.qkv, self.sizes, strict=True)
        )
        return rotate(q, angles), rotate(k, angles), v

    def forward(self, x: Tensor, angles: Tensor, attend: Attend) -> Tensor:
        """Add attention and MLP to x, in place: at 131,072 tokens every copy of it is a gigabyte."""
        out = attend(*self.project(x, angles))
        x += self.o(out.transpose(1, 2).flatten(2))
        for rows in x.split(self.mlp_chunk, dim=1):
            normed = rms_norm(rows, rows.shape[-1:])
            rows += self.down(silu(self.gate(normed)).mul_(self.up(normed)))
        return x


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@dataclass(frozen=True)
class Stack:
    layers: list[Layer]
    x: Tensor
    angles: Tensor

    @staticmethod
    def of(session: Session) -> "Stack":
        plan, device = session.plan, session.device
        torch.manual_seed(plan.seed)
        layers = [Layer(session) for _ in range(plan.layers)]
        x = torch.randn(1, plan.long, plan.hidden, device=device, dtype=plan.dtype)
        rates = 5e5 ** (-torch.arange(plan.head_dim // 2, device=device) / (plan.head_dim // 2))
        return Stack(layers, x, torch.arange(plan.long, device=device)[:, None] * rates)

    def run(self, attend: Attend, watch: Stopwatch | None = None) -> Tensor:
        def attend_timed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if watch is None:
                return attend(q, k, v)
            with watch.running():
                return attend(q, k, v)

        x = self.x.clone()
        for layer in self.layers:
            x = layer(x, self.angles, attend_timed)
        return x


def stack_candidate(session: Session, stack: Stack, base: Candidate, *, costly: bool) -> Candidate:
    """Put a candidate's attention into the stack; what it approximates does not change."""
    seconds: dict[str, float] = {}
    attend = base.attend
    if attend is None:
        raise ValueError(f"{base.name} attends to its own tensors alone: it cannot run in a stack")

    def call() -> Outputs:
        watch = Stopwatch(session.device)
        with torch.inference_mode():
            out = stack.run(attend, watch)
        seconds["attention_s"] = watch.seconds()
        return (out,)

    def details() -> Record:
        with torch.inference_mode():
            q, k, v = stack.layers[0].project(stack.x, stack.angles)
            report = audit(
                q, k, v, attend(q, k, v), rows=session.plan.audit_rows, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
        return {**seconds, "first_layer_error": pool([report])}

    return replace(base, call=call, costly=costly, details=details)


def stack(session: Session) -> None:
    """Run all layers with each candidate's attention; exact attention once, as it takes many seconds."""
    plan = session.plan
    layers = Stack.of(session)
    warm = replace(layers, layers=layers.layers[:1])
    with torch.inference_mode():
        task = Task(Tensors("random layers", NOTE, *layers.layers[0].project(layers.x, layers.angles)))
        fastest = next(iter(time_exact(session)))
        bases = [*exact_candidates(task, [fastest]), *our_candidates(session, task)]
    entries: list[Entry] = []
    for base in bases:
        if isinstance(base, Candidate):
            # kernels are built on one layer, not on all
            stack_candidate(session, warm, base, costly=True).call()
            base = stack_candidate(session, layers, base, costly=base.exact)
        entries.append(base)
    shape = task.shape() | {"title": "prefill of a stack", "layers": plan.layers, "hidden": plan.hidden, "mlp": plan.mlp}
    scene = Scene(shape, "random layers", NOTE, _against(fastest), lambda pairs: None)
    session.journal.write(compare(session, "stack", scene, entries))


def _against(exact: str) -> Callable[[str, Outputs], Error | None]:
    """Judge the last hidden states by those of the exact stack, which runs first."""
    kept: list[Tensor] = []

    def judge(name: str, outputs: Outputs) -> Error | None:
        if name == exact:
            kept.append(outputs[0])
        if name == exact or not kept:
            return None
        off = relative(outputs[0], kept[0])
        return Error(off, off, off, outputs[0].shape[1], 1)

    return judge
