"""The two ceilings of the device, measured in the run, and the time below which a forward pass cannot be."""

import statistics

import torch
from torch import Tensor

from gpu.session import Ceilings, Plan, Record, Session
from gpu.timing import seconds_of

_ROUNDS = 9


def measure_ceilings(session: Session) -> tuple[Ceilings, Record]:
    """Copy a tensor far beyond the caches, and multiply two large matrices, in the precision of the run."""
    plan, device = session.plan, session.device
    size = plan.matmul_size
    ceilings = Ceilings(_copy_bytes_per_s(plan, device), _matmul_flop_per_s(size, plan.dtype, device))
    shown = f"copies at {ceilings.bytes_per_s / 1e9:,.0f} GB/s, multiplies at {ceilings.flop_per_s / 1e12:,.3g} TFLOP/s"
    return ceilings, {
        "part": "ceilings", "ceilings": ceilings, "copied_bytes": plan.copied_bytes, "matmul_size": size, "rounds": _ROUNDS,
        "shown": shown,
    }  # fmt: skip


def _copy_bytes_per_s(plan: Plan, device: torch.device) -> float:
    source = torch.zeros(plan.copied_bytes // 2 // plan.dtype.itemsize, dtype=plan.dtype, device=device)
    target = torch.empty_like(source)
    # a copy reads and writes
    return 2 * source.numel() * source.element_size() / _median(lambda: target.copy_(source), device)


def _matmul_flop_per_s(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _median(lambda: torch.mm(a, b, out=out), device)


def _median(call, device: torch.device) -> float:
    for _ in range(3):
        call()
    return statistics.median(seconds_of(call, device) for _ in range(_ROUNDS))


def floor_seconds(ceilings: Ceilings, q: Tensor, k: Tensor, v: Tensor, pairs: float) -> float:
    """Give max(bytes / bandwidth, FLOP / rate): q, k, v and out once, and two products of each listed pair."""
    moved = sum(x.numel() * x.element_size() for x in (q, k, v))
    moved += q.numel() // q.shape[3] * v.shape[3] * q.element_size()
    flop = 2 * pairs * (q.shape[3] + v.shape[3]) * q.numel() // q.shape[3]
    return max(moved / ceilings.bytes_per_s, flop / ceilings.flop_per_s)
