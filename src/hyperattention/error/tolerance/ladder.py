"""A ladder of budgets: methods by increasing cost; exact attention follows the last rung."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from hyperattention.methods.base import check_method
from hyperattention.methods.default import GPU_CROSSOVER, LEAN_CROSSOVER, lean_method
from hyperattention.methods.method import Method
from hyperattention.select.density import Density
from hyperattention.select.draw import Draw
from hyperattention.select.draw_alike import DrawAlike
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.key_scan import KeyScan
from hyperattention.select.stage import LookAhead

# a length at which costs are compared
_LONG = 10**9
# rungs of the default ladder per doubling of the draws: the error falls by about a quarter from one rung to the next
_TO_A_DOUBLING = 2
# draws of the first rung, relative to the method whose crossover is known: with fewer draws, sinks, window and the choice of
# keys would cost more than the draws
_LEAN_FIRST, _ALIKE_FIRST = 1 / 4, 1 / 16
_MULTIPLE = 16
# The rung for alike queries whose crossover is known. Lists of 128 rows, where the default has 64: half of the products and
# of the lists to gather, so that as many pairs, and less time, have room for more draws and give a smaller error
_ALIKE = Method(Sinks(16), Window(192), DrawAlike(1760, rows=128), tile=128)
# keys at which that rung takes as long as SDPA on one CPU thread, four heads of a group (docs/log.md)
ALIKE_CROSSOVER = 16_384
# time that a rung for alike queries may take, relative to exact attention: more than one, since pairs come first
_ALIKE_OVERTIME = 1.25
# averaged queries per tile that scan its keys
_POOLED = 8


@dataclass(frozen=True)
class Ladder:
    """Methods by increasing cost, tried until the error is within a tolerance; exact attention follows the last one.

    Args:
        rungs: lists of stages, each listing more pairs than the one before, in tiles of equal size.
        worth: largest cost in pairs, relative to exact attention's, at which a rung may run: 1 to save pairs; a smaller
            value to save time, because a listed pair costs more time than a pair of a full product.

    Raises:
        TypeError: if a rung is not a list of stages.
        ValueError: if there is no rung, the costs do not increase, the tile sizes differ, a rung chooses keys by all queries
            of a sequence, or `worth` is not in (0, 1].

    Example:
        >>> Ladder((Method(Sinks(4), Draw(64)), Method(Sinks(4), Draw(256))))
    """

    rungs: tuple[Method, ...]
    worth: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rungs", tuple(self.rungs))
        if not self.rungs:
            raise ValueError("Ladder(()): give at least one rung; for exact attention use method=Exact()")
        for rung in self.rungs:
            if not isinstance(rung, Method):
                raise TypeError(f"Ladder takes lists of stages such as Method(...), not {rung!r}")
            if rung.looks_ahead == LookAhead.SEQUENCE:
                raise ValueError(
                    f"{rung!r} chooses keys by all queries of a sequence, so a few queries cannot show its error: "
                    "use stages that depend on no query outside their tile"
                )
        if len({rung.tile for rung in self.rungs}) > 1:
            raise ValueError(f"Ladder of tiles {[rung.tile for rung in self.rungs]}: all rungs must share one tile size")
        pairs = [rung.cost(_LONG).pairs for rung in self.rungs]
        if any(above <= below for below, above in pairwise(pairs)):
            raise ValueError(f"Ladder of {pairs} pairs per query: order the rungs by increasing cost")
        if not 0 < self.worth <= 1:
            raise ValueError(f"Ladder(worth={self.worth}): it must lie in (0, 1], relative to exact attention's pairs")

    @property
    def tile(self) -> int:
        """Positions in a tile of any rung."""
        return self.rungs[0].tile


def default_ladder(num_keys: int, *, device: torch.device | str | None = None) -> Ladder:
    """Return the ladder that `tolerance` uses if none is given.

    From `ALIKE_CROSSOVER` keys on, rungs draw for alike queries (`DrawAlike`), on every device. Below that length rungs are
    the lean method with fewer and with more draws. If a tile sees few keys, eight averaged queries scan all of them there,
    in place of the hierarchical search.

    A rung may run if its share of exact attention's pairs is at most that of a method at its crossover, where both take
    equal time. While all keys are scored one by one, products grow like exact attention's pairs do, so that this share is
    the same at every length. A GPU has the longer crossover of `default_method`, because no card has run these rungs
    yet. Rungs for alike queries may take a quarter more time than exact attention: they serve heads that no cheaper one
    serves, and most heads of a call take less.

    Args:
        num_keys: keys of the call; no rung draws more.
        device: device of the call's tensors.

    Returns:
        rungs whose draws double every second rung.
    """
    on_gpu = device is not None and torch.device(device).type == "cuda"
    if num_keys < ALIKE_CROSSOVER:
        return _lean_ladder(num_keys, GPU_CROSSOVER if on_gpu else LEAN_CROSSOVER)
    return _around(_ALIKE, GPU_CROSSOVER if on_gpu else ALIKE_CROSSOVER, num_keys, _ALIKE_FIRST, _ALIKE_OVERTIME)


def _lean_ladder(num_keys: int, crossover: int) -> Ladder:
    """Make the ladder of the lean method, with a scan where it searches."""
    method = lean_method(crossover)
    if not isinstance(method, Method) or not isinstance(method.stages[-1], Draw):
        raise TypeError(f"the lean method is {method!r}: a ladder needs a method that ends in a Draw")
    ladder = _around(method, crossover, num_keys, _LEAN_FIRST)
    return replace(ladder, rungs=tuple(_scanning(rung) for rung in ladder.rungs))


def _around(method: Method, crossover: int, num_keys: int, first: float, overtime: float = 1.0) -> Ladder:
    """Make a ladder of a method with fewer and more draws, whose rungs are worth what the method spends at its crossover."""
    cost, draw = method.cost(crossover), method.stages[-1]
    assert isinstance(draw, Draw | DrawAlike)
    worth = min(1.0, overtime * (cost.pairs + cost.selection_pairs) / cost.exact_pairs)
    least = draw.num * first
    steps = max(0, math.floor(_TO_A_DOUBLING * math.log2(max(1, num_keys) / least)))
    numbers = sorted({_rounded(least * 2 ** (step / _TO_A_DOUBLING)) for step in range(steps + 1)})
    rungs = (Method(*method.stages[:-1], replace(draw, num=num), tile=method.tile) for num in numbers)
    return Ladder(tuple(rungs), worth)


def _scanning(rung: Method) -> Method:
    """Scan keys where few are seen, because missed keys increase the error."""
    *others, draw = rung.stages
    assert isinstance(draw, Draw)
    by: Density = KeyScan(_POOLED, beyond=draw.by) if isinstance(draw.by, HierarchicalSearch) else draw.by
    return Method(*others, replace(draw, by=by), tile=rung.tile)


def check_tolerance(tolerance: object, method: object, standard_error: bool = False) -> None:
    """Check that `method` is a method, or a ladder if a tolerance is given.

    Args:
        tolerance: mean relative row error allowed, if given.
        method: the method to run, if given.
        standard_error: whether standard errors are asked for as well.

    Raises:
        TypeError: if `method` is neither, for example a single stage, or the tolerance is not a number.
        ValueError: if the tolerance is not in (0, 1), or a method or standard errors are asked for together with it.
    """
    ladder = isinstance(method, Ladder)
    if tolerance is None:
        if ladder:
            raise ValueError("method is a Ladder, which needs a tolerance to choose a rung: give tolerance=0.02 as well")
        if method is not None:
            check_method(method)
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance={tolerance!r}: it must be a number in (0, 1), such as 0.02")
    if not 0 < tolerance < 1:
        raise ValueError(
            f"tolerance={tolerance!r}: it is a mean relative error and must lie in (0, 1); for none use method=Exact()"
        )
    if standard_error:
        raise ValueError("standard_error with tolerance, whose report bounds every head's error: leave one of them out")
    if method is not None and not ladder:
        raise ValueError(
            f"tolerance={tolerance} chooses the method by itself, and method={method!r} was given: leave one of them out, "
            "or give method=Ladder((...)) to choose from"
        )


def _rounded(num: float) -> int:
    return max(1, round(num / _MULTIPLE)) * _MULTIPLE
