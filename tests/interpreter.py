"""Triton's interpreter as the tests need it: on CPU tensors, with its products of bfloat16 mended, in poisoned memory."""

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from hyperattention.kernels.decode import operator as decode_operator
from hyperattention.kernels.list import operator as operator


def read_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (operator, decode_operator):
        monkeypatch.setattr(module, "triton_reads", lambda *tensors: all(x.dtype != torch.float64 for x in tensors))
    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        # Triton 3.9 keeps bfloat16 as bit patterns, and multiplies those
        wide = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return plain(self, *wide, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, alike = torch.Tensor.new_empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        if x.device.type == "meta" or x.dtype == torch.bool:
            return x
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min // 2)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: poisoned(fresh(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poisoned(alike(*args, **options)))
