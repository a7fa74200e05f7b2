"""A ladder of budgets: methods by increasing cost, whose step after the last is exact attention."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from hyperattention.methods.base import check_method
from hyperattention.methods.default import CROSSOVER, GPU_CROSSOVER, default_method
from hyperattention.methods.method import Method
from hyperattention.select.density import Density
from hyperattention.select.draw import Draw
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.key_scan import KeyScan
from hyperattention.select.stage import LookAhead

# any length beyond the crossover gives the same default
_LONG = 10**9
# rungs of the default ladder to a doubling of the draws: an error falls by about a quarter from one to the next
_TO_A_DOUBLING = 2
# draws of the first rung, relative to the default method's: below, sinks and window cost more than the draws
_FIRST = 1 / 4
_MULTIPLE = 16
# averaged queries of a tile that scan its keys
_POOLED = 8


@dataclass(frozen=True)
class Ladder:
    """Methods by increasing cost, to be climbed until the error is small enough; after the last comes exact attention.

    Args:
        rungs: lists of stages, each listing more pairs than the one before, in tiles of equal size.
        worth: pairs spent, relative to exact attention's, up to which a rung is worth running: 1 to save pairs, less where
            time is to be saved, because a listed pair costs more time than one of a full product.

    Raises:
        TypeError: if a rung is not a list of stages.
        ValueError: if there is no rung, they do not rise, their tiles differ, one chooses by all queries of a sequence, or
            `worth` is not in (0, 1].

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
                    f"{rung!r} chooses by all queries of a sequence, so no few of them can tell its error: "
                    "use stages that look no further than their tile"
                )
        if len({rung.tile for rung in self.rungs}) > 1:
            raise ValueError(f"Ladder of tiles {[rung.tile for rung in self.rungs]}: all rungs must share one tile size")
        pairs = [rung.cost(_LONG).pairs for rung in self.rungs]
        if any(above <= below for below, above in pairwise(pairs)):
            raise ValueError(f"Ladder of {pairs} pairs a query: order the rungs by increasing cost")
        if not 0 < self.worth <= 1:
            raise ValueError(f"Ladder(worth={self.worth}): it must lie in (0, 1], relative to exact attention's pairs")

    @property
    def tile(self) -> int:
        """Positions in a tile of any rung."""
        return self.rungs[0].tile


def default_ladder(num_keys: int, *, device: torch.device | str | None = None) -> Ladder:
    """Give the ladder that `tolerance` climbs if none is named: the default method with fewer draws, and with more.

    Where a tile sees few keys they are scanned by eight averaged queries, since an error is what is asked for here, and lost
    keys show in it: a mean error of 0.040 beside 0.056 by the default's descent on the reference model, up to 40% less on
    structured inputs. The time is about the descent's only where the CPU multiplies 8-bit integers fast, elsewhere more.

    A rung is worth running while it spends no larger a share of exact attention's pairs than the default method does at its
    measured crossover, where both take equal time.

    Args:
        num_keys: keys of the call; no rung draws more.
        device: where the call's tensors are.

    Returns:
        rungs whose draws double every second one.

    Raises:
        TypeError: if the default method does not end in draws.
    """
    method = default_method(_LONG)
    if not isinstance(method, Method) or not isinstance(method.stages[-1], Draw):
        raise TypeError(f"the default method is {method!r}: a ladder can only be made of one that ends in draws")
    crossover = GPU_CROSSOVER if device is not None and torch.device(device).type == "cuda" else CROSSOVER
    cost = method.cost(crossover)
    worth = min(1.0, (cost.pairs + cost.selection_pairs) / cost.exact_pairs)
    first = method.stages[-1].num * _FIRST
    steps = max(0, math.floor(_TO_A_DOUBLING * math.log2(max(1, num_keys) / first)))
    numbers = {_rounded(first * 2 ** (step / _TO_A_DOUBLING)) for step in range(steps + 1)}
    return Ladder(tuple(_with_draws(method, num) for num in sorted(numbers)), worth)


def _scanning(by: Density) -> Density:
    return KeyScan(_POOLED, beyond=by) if isinstance(by, HierarchicalSearch) else by


def check_tolerance(tolerance: object, method: object, standard_error: bool = False) -> None:
    """Check that `method` is one, or a ladder of them where a tolerance is given.

    Args:
        tolerance: mean relative row error allowed, if it was given.
        method: what should run, if it was named.
        standard_error: whether standard errors are asked for as well.

    Raises:
        TypeError: if the method is anything else, such as a stage alone, or the tolerance is no number.
        ValueError: if the tolerance is not in (0, 1), or a method or standard errors are asked for beside it.
    """
    ladder = isinstance(method, Ladder)
    if tolerance is None:
        if ladder:
            raise ValueError("method is a Ladder, which is climbed until a tolerance is met: give tolerance=0.02 as well")
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
        raise ValueError("standard_error beside tolerance: its report bounds every head's error; leave one of them out")
    if method is not None and not ladder:
        raise ValueError(
            f"tolerance={tolerance} chooses the method by itself, and method={method!r} was given: leave one of them out, "
            "or give method=Ladder((...)) to choose from"
        )


def _rounded(num: float) -> int:
    return max(1, round(num / _MULTIPLE)) * _MULTIPLE


def _with_draws(method: Method, num: int) -> Method:
    """Change how many keys the last stage draws."""
    *others, draw = method.stages
    assert isinstance(draw, Draw)
    return Method(*others, replace(draw, num=num, by=_scanning(draw.by)), tile=method.tile)
