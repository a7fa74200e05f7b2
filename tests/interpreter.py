"""Triton's interpreter as the tests need it: on CPU tensors, with its products of bfloat16 mended, in poisoned memory."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from hyperattention.kernels.decode import operator as decode_operator
from hyperattention.kernels.launch import Launch
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


def refuse_other_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a kernel touches what is not memory of its arguments: a device would read anything there, or stop."""
    spans: list[np.ndarray] = []
    run = Launch.run

    def watched(self: Launch) -> None:
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(self.arguments.values())
        }
        begin = np.array(sorted(storages), dtype=np.uint64)
        spans[:] = begin, begin + np.array([storages[int(x)] for x in begin], dtype=np.uint64)
        run(self)
        spans.clear()

    def check(ptrs, mask) -> None:
        live = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
        # tests run kernels of their own without a launch
        if not spans or not live.any():
            return
        begin, end = spans
        # of the lowest and the highest address alone, where both lie in one argument
        at = ptrs.data[live].astype(np.uint64)
        ends = np.array([at.min(), at.max()])
        first, last = np.searchsorted(begin, ends, side="right")
        at = ends if first == last else at
        place = np.searchsorted(begin, at, side="right").astype(np.int64) - 1
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        assert (place >= 0).all(), "an address before all arguments"
        assert (at + np.uint64(size) <= end[place]).all(), "an address beyond an argument"

    def guarded(name: str, mask_at: int) -> None:
        plain = getattr(InterpreterBuilder, name)

        def checked(self, *args):
            check(args[0], args[mask_at])
            return plain(self, *args)

        monkeypatch.setattr(InterpreterBuilder, name, checked)

    monkeypatch.setattr(Launch, "run", watched)
    guarded("create_masked_load", 1)
    guarded("create_masked_store", 2)


def tensors_of(values: Iterable) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_of(value)
