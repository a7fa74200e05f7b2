"""Who takes part in a comparison over budgets: exact attention once, and every method at every budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hyperattention.bench.rivals import LEAST, rivals
from hyperattention.bench.rows import LONG, Row, control_of, find_default
from hyperattention.methods.default import lean_method, thorough_method
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.methods.presets import HyperAttention
from hyperattention.select.draw import Draw
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.key_scan import KeyScan

EXACT, CONTROL, OURS = "exact", "control", "default"
# names and titles of this project's own methods
OWN = {
    "thorough": "hyperattention, thorough",
    "scan_64": "hyperattention, keys scanned by every query",
    "scan_16": "hyperattention, keys scanned by 16 averages",
    OURS: "hyperattention, default",
    "lean": "hyperattention, lean",
}


@dataclass(frozen=True)
class Candidate:
    """One method at one budget.

    Args:
        family: the method, whatever its budget.
        title: the family's name in tables and plots.
        slots: keys it may list a query; None for exact attention, which has no budget.
        row: what runs, named for family and budget.
    """

    family: str
    title: str
    slots: int | None
    row: Row

    @property
    def exact(self) -> bool:
        """Whether it is what errors are measured by."""
        return isinstance(self.row.method, Exact)

    @property
    def oracle(self) -> bool:
        """Whether it chooses by what no method knows before attending."""
        return "oracle" in self.title


def candidates(budgets: Sequence[int], families: Sequence[str] | None = None) -> tuple[Candidate, ...]:
    """List exact attention first, then for each budget what must be beaten, the rivals, and this project's methods.

    Args:
        budgets: keys listed a query.
        families: names of the methods wanted; None for all. Exact attention always takes part.

    Returns:
        the candidates, by budget.

    Raises:
        ValueError: if there is no budget, one is too small or there twice, or a name is unknown.
    """
    if not budgets or len(set(budgets)) < len(budgets):
        raise ValueError(f"budgets {list(budgets)}: name at least one, and each once, such as 512,1024,2048")
    found = [Candidate(EXACT, "exact (SDPA)", None, Row(EXACT, "exact (SDPA)", Exact()))]
    known = _makers(LEAST)
    unknown = [name for name in families or () if name != EXACT and name not in known]
    if unknown:
        raise ValueError(f"no method is called {', '.join(unknown)}: choose among {', '.join([EXACT, *known])}")
    for slots in budgets:
        # only what takes part is made: others may need more slots
        wanted = (make for name, make in _makers(slots).items() if families is None or name in families)
        found += [_candidate(make(), slots) for make in wanted]
    return tuple(found)


def own_methods() -> dict[str, Method]:
    """Give this project's methods at their usual budgets, by name."""
    usual, careful, lean = find_default(), thorough_method(LONG), lean_method(LONG)
    if not isinstance(careful, Method) or not isinstance(lean, Method):
        raise TypeError(f"{careful!r} and {lean!r}: budgets can only be set for a Method")
    scans = {f"scan_{num}": _scanning(careful, num) for num in (64, 16)}
    return {"thorough": careful} | scans | {OURS: usual, "lean": lean}


def _scanning(careful: Method, pooled: int) -> Method:
    *others, draw = careful.stages
    if not isinstance(draw, Draw) or not isinstance(draw.by, KeyScan):
        raise TypeError(f"the thorough method is {careful!r}: it does not end in draws by a scan")
    return Method(*others, replace(draw, by=replace(draw.by, pooled=pooled)), tile=careful.tile)


def at_budget(method: Method, slots: int) -> Method:
    """Give a method another budget: fewer draws or more; a window smaller where draws would have less than it.

    Args:
        method: sinks, a window and draws.
        slots: keys it lists a query.

    Returns:
        the method, at its own budget unchanged.

    Raises:
        ValueError: if the budget leaves nothing to draw.
        TypeError: if the method does not end in draws after sinks and a window.
    """
    *others, draw = method.stages
    if not isinstance(draw, Draw) or not all(isinstance(stage, (Sinks, Window)) for stage in others):
        raise TypeError(f"the method is {method!r}: budgets can only be set for sinks, a window and draws")
    # a window lists its tile as well
    fixed = sum(stage.slots(method.tile) - (stage.size if isinstance(stage, Window) else 0) for stage in others)
    if slots < fixed + 2:
        raise ValueError(f"a budget of {slots} keys a query: the method needs {fixed + 2}; name a larger one")
    spare = slots - fixed
    sized = [replace(stage, size=min(stage.size, spare // 2)) if isinstance(stage, Window) else stage for stage in others]
    left = slots - sum(stage.slots(method.tile) for stage in sized)
    return Method(*sized, replace(draw, num=left), tile=method.tile)


def _makers(slots: int) -> dict[str, Callable[[], Row]]:
    """List what must be beaten, the rivals and this project's methods, by name, each to be made when it takes part."""
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
    # the control of the default is the one that its claims are about
    others = {row.name: partial(rival, row.name) for row in rivals(LEAST) if row.name not in first}
    return first | others | {name: partial(own, name) for name in methods}


def _published(slots: int) -> HyperAttention:
    return HyperAttention(block_size=slots // 2, sample_size=slots - slots // 2)


def _window_at(slots: int, ours: Method) -> Method:
    """Spend a whole budget on sinks and window."""
    sinks = next(stage for stage in ours.stages if isinstance(stage, Sinks))
    return Method(sinks, Window(slots - sinks.slots(ours.tile) - ours.tile), tile=ours.tile)


def _candidate(row: Row, slots: int) -> Candidate:
    return Candidate(row.name, row.label, slots, Row(f"{row.name}@{slots}", f"{row.label}, {slots:,}", row.method))
