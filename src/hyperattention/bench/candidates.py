"""The candidates of a comparison over budgets: exact attention once, and every method at every budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hyperattention.bench.rivals import LEAST, rivals
from hyperattention.bench.rows import Row, control_of, find_default
from hyperattention.methods.default import lean_method
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.methods.presets import HyperAttention
from hyperattention.select.draw import Draw
from hyperattention.select.draw_alike import DrawAlike
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.key_scan import KeyScan

EXACT, CONTROL, OURS = "exact", "control", "default"
# a length at which the lean method searches as it does on most texts
_SEARCHED = 65_536
# names and titles of this project's own methods
OWN = {
    "scan_64": "hyperattention, keys scanned by every query",
    "scan_16": "hyperattention, keys scanned by 16 averages",
    OURS: "hyperattention, default",
    "lean": "hyperattention, lean",
}


@dataclass(frozen=True)
class Candidate:
    """One method at one budget.

    Args:
        family: the name of the method without its budget.
        title: the family's name in tables and plots.
        slots: largest number of keys listed for a query; None for exact attention, which has no budget.
        row: the method with its budget, named after both.
    """

    family: str
    title: str
    slots: int | None
    row: Row

    @property
    def exact(self) -> bool:
        """Whether the candidate is exact attention, the reference of all errors."""
        return isinstance(self.row.method, Exact)

    @property
    def oracle(self) -> bool:
        """Whether the candidate selects keys by their exact weights, which no method knows before attention."""
        return "oracle" in self.title


def candidates(budgets: Sequence[int], families: Sequence[str] | None = None) -> tuple[Candidate, ...]:
    """List exact attention, and then for each budget the baselines, the rivals, and this project's methods.

    Args:
        budgets: numbers of keys listed for each query.
        families: names of the methods; None for all. Exact attention is always included.

    Returns:
        the candidates, by budget.

    Raises:
        ValueError: if there is no budget, a budget is too small or occurs twice, or a name is unknown.
    """
    if not budgets or len(set(budgets)) < len(budgets):
        raise ValueError(f"budgets {list(budgets)}: give at least one budget, and each only once, such as 512,1024,2048")
    found = [Candidate(EXACT, "exact (SDPA)", None, Row(EXACT, "exact (SDPA)", Exact()))]
    known = _makers(LEAST)
    unknown = [name for name in families or () if name != EXACT and name not in known]
    if unknown:
        raise ValueError(f"no method is called {', '.join(unknown)}: choose from {', '.join([EXACT, *known])}")
    for slots in budgets:
        # only the requested methods are made, because others may need more slots
        wanted = (make for name, make in _makers(slots).items() if families is None or name in families)
        found += [_candidate(make(), slots) for make in wanted]
    return tuple(found)


def own_methods() -> dict[str, Method]:
    """Return this project's methods at their usual budgets, by name; the thorough one is the default with more draws."""
    usual, lean = find_default(), lean_method(_SEARCHED)
    if not isinstance(lean, Method):
        raise TypeError(f"{lean!r}: a budget can be set only for a Method; give one")
    scans = {
        f"scan_{num}": Method(Sinks(16), Window(128), Draw(611, by=KeyScan(num, beyond=HierarchicalSearch(pooled=32))))
        for num in (64, 16)
    }
    return scans | {OURS: usual, "lean": lean}


def at_budget(method: Method, slots: int) -> Method:
    """Change the budget of a method: the number of draws, and the window if it would be larger than the draws.

    Args:
        method: a method of sinks, a window and draws.
        slots: number of keys listed for each query.

    Returns:
        the method at the new budget; at its own budget the method is unchanged.

    Raises:
        ValueError: if the budget leaves no draws.
        TypeError: if the method is not sinks and a window followed by draws.
    """
    *others, draw = method.stages
    if not isinstance(draw, Draw | DrawAlike) or not all(isinstance(stage, (Sinks, Window)) for stage in others):
        raise TypeError(
            f"the method is {method!r}: a budget can be set only for sinks, a window and draws; give such a Method"
        )
    # a window also lists the keys of its tile
    fixed = sum(stage.slots(method.tile) - (stage.size if isinstance(stage, Window) else 0) for stage in others)
    if slots < fixed + 2:
        raise ValueError(f"a budget of {slots} keys a query is too small: give at least {fixed + 2}")
    spare = slots - fixed
    sized = [replace(stage, size=min(stage.size, spare // 2)) if isinstance(stage, Window) else stage for stage in others]
    left = slots - sum(stage.slots(method.tile) for stage in sized)
    return Method(*sized, replace(draw, num=left), tile=method.tile)


def _makers(slots: int) -> dict[str, Callable[[], Row]]:
    """List the baselines, the rivals and this project's methods by name, with a function that makes each."""
    methods = own_methods()

    def ours() -> Method:
        return at_budget(methods[OURS], slots)

    def own(name: str) -> Row:
        return Row(name, OWN[name], at_budget(methods[name], slots))

    def rival(name: str) -> Row:
        return next(row for row in rivals(slots) if row.name == name)

    first: dict[str, Callable[[], Row]] = {
        "sinks_window": lambda: Row("sinks_window", "sinks + window", _window_at(slots, ours())),
        CONTROL: lambda: Row(CONTROL, "control: + uniform draws", control_of(ours())),
        "published": lambda: Row("published", "HyperAttention, published", _published(slots)),
    }
    # only the control of the default is included, because the claims compare the default with it
    others = {row.name: partial(rival, row.name) for row in rivals(LEAST) if row.name not in first}
    return first | others | {name: partial(own, name) for name in methods}


def _published(slots: int) -> HyperAttention:
    return HyperAttention(block_size=slots // 2, sample_size=slots - slots // 2)


def _window_at(slots: int, ours: Method) -> Method:
    """Make a method that uses the complete budget for sinks and window."""
    sinks = next(stage for stage in ours.stages if isinstance(stage, Sinks))
    return Method(sinks, Window(slots - sinks.slots(ours.tile) - ours.tile), tile=ours.tile)


def _candidate(row: Row, slots: int) -> Candidate:
    return Candidate(row.name, row.label, slots, Row(f"{row.name}@{slots}", f"{row.label}, {slots:,}", row.method))
