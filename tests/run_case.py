"""How the laws run a case, and what a case lets them expect."""

import pytest
from torch import Tensor

import hyperattention as ha
from assertions import assert_same_bits
from cases import Case
from front_door import with_lse
from hyperattention.methods.method import Method

both_masks = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])

# of methods that are no list of stages: rows and keys of a tile of their own
TILE = 16


def lists_of(case: Case) -> Method:
    if not isinstance(case.method, Method):
        pytest.skip("it is no list of stages: there is no selection to look at")
    return case.method


def nothing_ahead(case: Case) -> None:
    if case.method.looks_ahead == ha.LookAhead.SEQUENCE:
        pytest.skip("it declares that it looks at the whole sequence")


def run(case: Case, q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    options = {"is_causal": True, "enable_gqa": True, "method": case.method} | options
    return with_lse(q, k, v, **options)


def assert_all_same_bits(ours: tuple[Tensor, ...] | list[Tensor], expected: tuple[Tensor, ...] | list[Tensor]) -> None:
    for x, y in zip(ours, expected, strict=True):
        assert_same_bits(x, y)


def tile_of(case: Case) -> int:
    return case.method.tile if isinstance(case.method, Method) else TILE


def unharmed(case: Case, last: int) -> int:
    """Rows that may not change when tokens after `last` do."""
    return last + 1 if case.method.looks_ahead == ha.LookAhead.NOTHING else (last + 1) // tile_of(case) * tile_of(case)


def edges(case: Case) -> list[int]:
    """The last row of a tile, the first of the next, and a row inside one; near the middle and near the end."""
    tile, middle = tile_of(case), case.num_tokens // 2 // tile_of(case) * tile_of(case)
    return [middle - 1, middle, middle + tile // 2, case.num_tokens - 2]
