"""What torch takes for a dtype and a device when none is named changes no bit and moves no tensor."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from assertions import assert_same_bits
from subjects import Call, subjects

SUBJECTS = subjects()
SETTINGS = {
    "float16": (torch.float16, "cpu"),
    "bfloat16": (torch.bfloat16, "cpu"),
    "float64": (torch.float64, "cpu"),
    "another device": (torch.float32, "meta"),
}


class NoTensorOf(TorchDispatchMode):
    """Refuse operators that give a tensor of a dtype which nothing given to them has."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        if self._among(given) and not self._among((args, kwargs)):
            frames = [x for x in traceback.extract_stack() if "/hyperattention/" in x.filename]
            where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "outside the package"
            raise AssertionError(f"{func} made a tensor of the default dtype: {where}")
        return given

    def _among(self, tree: object) -> bool:
        return any(isinstance(x, torch.Tensor) and x.dtype == self.dtype for x in tree_leaves(tree))


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # the CPU need not be named: it is the default
        with nullcontext() if device == "cpu" else torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("call", SUBJECTS.values(), ids=SUBJECTS)
def test_results_are_the_same_bits_under_any_default(call: Call) -> None:
    expected = call()
    assert expected
    for dtype, device in SETTINGS.values():
        with defaults(dtype, device):
            ours = call()
        for x, y in zip(ours, expected, strict=True):
            assert x.device == y.device
            assert_same_bits(x.nan_to_num() if x.is_floating_point() else x, y.nan_to_num() if y.is_floating_point() else y)


@pytest.mark.parametrize("call", SUBJECTS.values(), ids=SUBJECTS)
def test_nothing_on_the_way_is_of_the_default_dtype(call: Call) -> None:
    # inputs are float32, sums float64, keys of a scan 8-bit integers: nothing asks for float16
    with defaults(torch.float16, "cpu"), NoTensorOf(torch.float16):
        call()


def test_the_watch_sees_a_tensor_of_the_default_dtype() -> None:
    count = torch.arange(3)
    for made in (lambda: torch.zeros(1), lambda: count / 2, lambda: torch.where(count > 1, 0.0, 1.0), lambda: count + 0.5):
        with defaults(torch.float16, "cpu"), NoTensorOf(torch.float16), pytest.raises(AssertionError, match="default dtype"):
            made()
