"""Published HyperAttention's own code beside ours, from a checkout of it; nothing of it is copied here.

Its calls of flash-attn, and of the Triton kernel it brings for an old Triton, go to torch's kernels that return the lse as
well: the sums are the same and the kernels are torch's own exact ones. einops is stood in for where it is missing.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from gpu.candidates import Candidate, Entry, Failure
from gpu.session import Session, reason_of
from gpu.tasks import Task
from hyperattention.methods.presets import HyperAttention

# where checkouts keep the class: the published repository's layout first
MODULES = ("models.attention.hyper_attn", "hyper_attn.hyper_attn", "src.attn.hyper_attn", "hyper_attn")


def attend_with_lse(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend exactly by a kernel of torch that returns the lse; layout [batch, tokens, heads, head_dim], as flash-attn's."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    aten = torch.ops.aten
    if q.device.type != "cuda":
        bias = None if bias is None else bias.to(q.dtype)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    elif bias is None:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        bias = bias.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)[:2]
    return out.transpose(1, 2), lse[..., : q.shape[2]]


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, *, return_attn_probs=False):
    """Stand in for flash_attn.flash_attn_func."""
    if dropout_p:
        raise NotImplementedError(f"dropout_p={dropout_p}: the stand-in for flash-attn has no dropout")
    out, lse = attend_with_lse(q, k, v, softmax_scale, causal)
    return (out, lse, None) if return_attn_probs else out


def triton_flash_attn_func(q, k, v, bias=None, causal=False, softmax_scale=None):
    """Stand in for the Triton kernel that the checkout brings."""
    return attend_with_lse(q, k, v, softmax_scale, causal, bias)


def rearrange(x: Tensor, pattern: str) -> Tensor:
    """Stand in for einops.rearrange, in the one way it is used."""
    if "".join(pattern.split()) != "n->1n1":
        raise NotImplementedError(f"einops is not installed, and its stand-in does not know the pattern {pattern!r}")
    return x[None, :, None]


def _stand_in(name: str, **functions: object) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(functions)
    return module


@contextmanager
def stand_ins(parent: str) -> Iterator[None]:
    """Offer the modules that the checkout imports, and take them back once it has bound their names."""
    kernel = f"{parent}.flash_attn_triton_for_hyper" if parent else "flash_attn_triton_for_hyper"
    offered = {"flash_attn": _stand_in("flash_attn", flash_attn_func=flash_attn_func)}
    offered[kernel] = _stand_in(kernel, flash_attn_func=triton_flash_attn_func)
    if find_spec("einops") is None:
        offered["einops"] = _stand_in("einops", rearrange=rearrange)
    before = {name: sys.modules.get(name) for name in offered}
    sys.modules.update(offered)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def load_peer(folder: Path) -> type:
    """Find the class HyperAttention in a checkout."""
    if not folder.is_dir():
        raise ImportError(f"{folder} is no folder")
    sys.path.insert(0, str(folder.resolve()))
    reasons = []
    try:
        for name in MODULES:
            with stand_ins(name.rpartition(".")[0]):
                try:
                    return importlib.import_module(name).HyperAttention
                except (ImportError, AttributeError) as error:
                    reasons.append(f"{name}: {error}")
    finally:
        sys.path.remove(str(folder.resolve()))
    raise ImportError("; ".join(reasons))


def peer_candidates(session: Session, task: Task) -> list[Entry]:
    """Give both of its paths, with its published parameters: flash-attn's, and the one that masks keys counted twice."""
    paths = {"peer_flash": True, "peer_masked": False}
    if session.peer is None:
        return [Failure("peer_flash", "published code", "no checkout given: --peer DIR")]
    try:
        peer = load_peer(session.peer)
    except Exception as error:
        return [Failure("peer_flash", "published code", reason_of(error))]
    return [_peer_candidate(session, task, peer, name, cuda) for name, cuda in paths.items()]


def _peer_candidate(session: Session, task: Task, peer: type, name: str, cuda: bool) -> Entry:
    plan, label = session.plan, f"published code, {'flash path' if cuda else 'masked path'}"
    sizes = {"block_size": plan.peer_block, "sample_size": plan.peer_block, "min_seq_len": plan.peer_exact_below}
    torch.manual_seed(plan.seed)
    try:
        module = peer(input_dim=plan.head_dim, cuda=cuda, **sizes).to(device=session.device, dtype=plan.dtype)
    except Exception as error:
        return Failure(name, label, reason_of(error))
    tensors = task.tensors
    k, v = (x.repeat_interleave(tensors.q.shape[1] // x.shape[1], 1) for x in (tensors.k, tensors.v))

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (module(tensors.q, k, v, causal=task.causal),)

    # counted by our version of the same algorithm
    pairs = HyperAttention(**sizes).cost(task.keys, is_causal=task.causal, head_dim=plan.head_dim).pairs
    written = f"{peer.__module__}.HyperAttention({', '.join(f'{key}={size}' for key, size in sizes.items())}, cuda={cuda})"
    note = "kv heads repeated before the call; flash calls go to torch's kernels"
    return Candidate(name, label, call, written, pairs, pairs / task.exact_pairs, note=note)
