"""An object that takes another one as an argument refuses anything else at once, by name, and not when it first runs."""

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from types import ModuleType

import jaxtyping
import pytest

import hyperattention as ha
from hyperattention import policies, rivals, select
from hyperattention.cache import page_rank
from hyperattention.experimental import approx_row_sums

MODULES: tuple[ModuleType, ...] = (ha, select, rivals, policies, page_rank, approx_row_sums)
OWNERS = (
    (ha.Draw(16), "by"),
    (ha.TopBlocks(2, 8), "by"),
    (ha.TopBlocks(2, 8), "coarse"),
    (ha.KeyScan(8), "beyond"),
    (ha.PooledChunks(), "local"),
    (select.Level(8, 4), "by"),
    (policies.TopPages(), "by"),
    (policies.LookOnce(), "pages"),
    (page_rank.TwoLevels(), "by"),
    (approx_row_sums.ApproxD(4), "heavy"),
)
# several parts in one argument: tested below, or in the file of the class
SEVERAL = {("ByHead", "methods"), ("ByLayer", "methods"), ("HierarchicalSearch", "levels"), ("Ladder", "rungs")}
SEVERAL |= {("Method", "stages"), ("Mix", "parts"), ("Scatterbrain", "stages")}
# what calls, files and the library itself make; nobody makes these by hand
MADE = {"AttentionResult", "CoveredKeys", "Plan", "Problem", "SequencesResult", "ToleranceReport"}


@pytest.fixture(autouse=True)
def without_type_checks() -> Iterator[None]:
    """Run as a user does: the checks of annotations that the other tests run under would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(("owner", "name"), OWNERS, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_a_number_in_place_of_a_part_is_refused_by_name(owner, name):
    with pytest.raises(TypeError, match=rf"{type(owner).__name__}\({name}=3\): {name} must be a .+, such as "):
        dataclasses.replace(owner, **{name: 3})


@pytest.mark.parametrize(
    "make",
    [
        lambda: ha.ByHead((3,)),  # type: ignore[arg-type]
        lambda: ha.ByLayer({0: 3}),  # type: ignore[dict-item]
        lambda: ha.HierarchicalSearch((3,)),  # type: ignore[arg-type]
        lambda: ha.Ladder((3,)),  # type: ignore[arg-type]
        lambda: ha.Method(3),  # type: ignore[arg-type]
        lambda: select.Mix((3, 1.0)),  # type: ignore[arg-type]
        lambda: ha.Scatterbrain(3),  # type: ignore[arg-type]
    ],
    ids=["ByHead", "ByLayer", "HierarchicalSearch", "Ladder", "Method", "Mix", "Scatterbrain"],
)
def test_a_number_among_several_parts_is_refused(make):
    with pytest.raises((TypeError, ValueError), match="3"):
        make()


def test_every_argument_that_is_a_part_is_tested_here():
    classes = {
        value
        for module in MODULES
        for value in vars(module).values()
        if inspect.isclass(value) and dataclasses.is_dataclass(value) and value.__module__.startswith("hyperattention.")
    }
    found = set()
    for each in classes:
        for name, kind in typing.get_type_hints(each.__init__).items():
            if name != "return" and "hyperattention." in str(kind) and each.__name__ not in MADE:
                found.add((each.__name__, name))
    assert found == {(type(owner).__name__, name) for owner, name in OWNERS} | SEVERAL
