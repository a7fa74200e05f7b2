"""What is written in files of kernels and no interpreter minds: numbers that are no float32, and precisions that AMD lacks.

Triton computes in float64 with a number that float32 cannot hold as a normal one, and refuses TF32 for most GPUs of AMD.
"""

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


def unguarded(source: str) -> Iterator[str]:
    """Find TF32 that is asked for without a look at the kind of GPU."""
    tree = ast.parse(source)
    choices = [
        node for node in ast.walk(tree) if isinstance(node, ast.IfExp) and "torch.version.hip" in ast.unparse(node.test)
    ]
    guarded = {id(node) for choice in choices for node in ast.walk(choice)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and str(node.value) in {"tf32", "tf32x3"} and id(node) not in guarded:
            yield str(node.value)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_ask_for_precisions_that_the_gpu_has(path):
    assert list(unguarded(path.read_text())) == []


def test_a_precision_that_amd_lacks_is_found():
    assert list(unguarded('x = "tf32"; y = "ieee" if torch.version.hip else "tf32x3"')) == ["tf32"]
