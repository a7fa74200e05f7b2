"""Count what an audit of 64 rows launches on a GPU, without one, and estimate its time beside that of the call.

python benchmarks/gpu/audit_counts.py      # or: python benchmarks/gpu/counts.py --audit

The launches of the list kernel and of its merge are counted and not made; its list is split as on 132 multiprocessors.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.counts import HEAD_DIM, HEADS, KV_HEADS, Count
from hyperattention.error import audit as audit_module
from hyperattention.error import exact_rows, interval
from hyperattention.kernels.list import triton_forward

ROWS = 64
# what products of a list kernel that keeps weights in two parts reach, a half more of them than others: 152 TFLOP/s of the
# general form were measured on an H100; a launch on the device, and what the host needs for it
FLOPS, SECONDS_OF_A_LAUNCH, SECONDS_OF_THE_HOST = 152e12, 4e-6, 20e-6


@dataclass(frozen=True)
class _Counted:
    """A launch that is counted in place of being made."""

    launches: Counter[str]
    name: str

    def run(self) -> None:
        self.launches[self.name] += 1


def count_audit(tokens: int, rows: int = ROWS) -> Counter[str]:
    """Count the launches of an audit of the error alone; whatever looks at a value of a tensor fails."""
    q, k = (torch.empty(1, heads, tokens, HEAD_DIM, dtype=torch.bfloat16, device="meta") for heads in (HEADS, KV_HEADS))
    with ExitStack() as stack:
        for module in (audit_module, exact_rows, interval):
            stack.enter_context(patch.object(module, "triton_reads", lambda *tensors: True))
        counted = stack.enter_context(Count())
        stack.enter_context(patch.object(triton_forward, "splits_of", lambda *given: splits_of(tokens)))
        for name in ("launch_forward", "launch_merge"):
            launch = _Counted(counted.launches, name)
            stack.enter_context(patch.object(triton_forward, name, lambda *given, launch=launch, **options: launch))
        audit_module.audit(q, k, k, q, rows=rows, is_causal=True, enable_gqa=True, hardness=False)
    return +counted.launches


def splits_of(tokens: int) -> int:
    """Count the programs that share a list: two waves of 132 multiprocessors, 8 lists of 256 rows in programs of 128."""
    return max(1, min(-(-2 * 132 // (KV_HEADS * 2)), tokens // (4 * 64)))


def seconds_of(tokens: int, launches: int) -> float:
    """Estimate the time of an audit on the device."""
    products = 3 * 2 * HEADS * ROWS * HEAD_DIM * tokens / 2
    return products / FLOPS + launches * SECONDS_OF_A_LAUNCH


def main() -> None:
    for tokens in (8192, 32_768, 131_072):
        counted = count_audit(tokens)
        total = counted.total()
        print(f"{tokens:,} tokens: {total} launches, {1e3 * seconds_of(tokens, total):.2f} ms of the device, host "
              f"{1e3 * total * SECONDS_OF_THE_HOST:.2f} ms; {dict(counted)}")  # fmt: skip


if __name__ == "__main__":
    main()
