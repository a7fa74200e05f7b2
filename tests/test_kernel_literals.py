"""Numbers written in kernels: Triton computes in float64 with one that float32 cannot hold as a normal number."""

import ast
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hyperattention

KERNELS = sorted((Path(hyperattention.__file__).parent / "kernels").rglob("triton_*.py"))
# 1e-38 is below the first: Triton 3.6 takes it for float64, and all that is computed with it
LEAST, MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def too_wide(source: str) -> Iterator[float]:
    for node in ast.walk(ast.parse(source)):
        number = node.value if isinstance(node, ast.Constant) and isinstance(node.value, float) else 0.0
        if number and math.isfinite(number) and not LEAST <= abs(number) <= MOST:
            yield number


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_numbers_in_kernels_are_of_float32(path):
    assert list(too_wide(path.read_text())) == []


def test_a_number_that_is_too_small_is_found():
    assert sorted(too_wide("x = max(y, 1e-38) + 1.2e-38 + 0.0 + 1e39")) == [1e-38, 1e39]
