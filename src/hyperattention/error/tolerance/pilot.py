"""The pilot: a few tiles of the call predict which rung of a ladder each head needs, before any rung runs on all queries."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.error.tolerance.certificate import Aim, exact_at, row_errors
from hyperattention.methods.method import Method
from hyperattention.problem import Problem
from hyperattention.random import uniform

# tiles of a pilot, and rows of each that are computed exactly
_TILES, _ROWS_IN_TILE = 16, 8
# a call with fewer complete tiles than this is too short for an approximation to save time
_FEWEST_TILES = 4
_PROBES = 2
# error ~ pairs^-power between two rungs: the usual power, the steepest power considered, and the limits of a fitted power
_POWER, _STEEP, _POWERS = 0.8, 1.3, (0.4, 1.6)
# a choice assumes a few more rows than planned, since a certificate may add some; assuming all of them, too many rungs
# failed
_ROOM = 1.2
# first counter of the choice of tiles and rows, which no certificate shares
_STREAM = 0x9170


@dataclass(frozen=True)
class Pilot:
    """Evenly spaced tiles of a call, from a random first one on, and exact rows in them, with which all rungs are compared.

    Args:
        problem: the queries of those tiles; each tile lists the same keys as in the entire call.
        index: sampled rows, as indices in `problem`, equally many in each tile.
        exact: exact attention of those rows.
        tiles: number of tiles.
        share: share of the call's queries that are in the tiles.
    """

    problem: Problem
    index: Int[Tensor, " rows"]
    exact: Float[Tensor, "batch heads rows value_dim"]
    tiles: int
    share: float

    def errors(self, rung: Method, kv_heads: Sequence[int]) -> Float[Tensor, "batch kv_heads group rows"]:
        """Run a rung on the tiles, for some kv heads, and return the errors of the sampled rows."""
        group = self.problem.group
        out = rung.attend(self.problem.of_heads(kv_heads)).out.index_select(2, self.index).to(self.problem.q.dtype)
        exact = self.exact.unflatten(1, (-1, group))[:, list(kv_heads)]
        return row_errors(out, exact.flatten(1, 2)).unflatten(1, (-1, group))


def pilot_spends(spends: float, exact_pairs: float, num_queries: int, tile: int) -> float:
    """Return the most that a pilot can spend: its exact rows, and probes of rungs that each cost `spends`.

    Args:
        spends: pairs that the rung spends per query.
        exact_pairs: pairs of a row of exact attention.
        num_queries: queries of the call.
        tile: positions in a tile.

    Returns:
        pairs, for each query of the call.
    """
    queries = min(num_queries, _TILES * tile)
    rows = queries // tile * min(_ROWS_IN_TILE, tile)
    return (rows * exact_pairs + _PROBES * queries * spends) / max(1, num_queries)


def take_pilot(problem: Problem, tile: int) -> Pilot | None:
    """Choose the tiles of a pilot and compute its exact rows.

    Args:
        problem: the call.
        tile: positions in a tile.

    Returns:
        the pilot, or None if the call has too few complete tiles.
    """
    edge = -problem.offset % tile
    count = (problem.num_queries - edge) // tile
    if count < _FEWEST_TILES:
        return None
    step = -(-count // _TILES)
    counters, device = (_STREAM, problem.seed, problem.layer), problem.device
    start = min(int(uniform((*counters, 0), "cpu") * step), step - 1)
    few = problem.of_spans(edge + start * tile, tile, step * tile)
    tiles, each = few.num_queries // tile, min(_ROWS_IN_TILE, tile)
    place = torch.arange(each, dtype=torch.int64, device=device)
    noise = uniform((*counters, 1, torch.arange(tiles, dtype=torch.int64, device=device)[:, None], place), device)
    row = ((place + noise) * (tile / each)).long().clamp(max=tile - 1)
    index = (torch.arange(tiles, dtype=torch.int64, device=device)[:, None] * tile + row).flatten()
    return Pilot(few, index, exact_at(few, index), tiles, few.num_queries / problem.num_queries)


@dataclass(frozen=True)
class _Search:
    """The state of the search for the rung of one kv head.

    Args:
        probed: errors of the rungs tried, in order.
        rung: the chosen rung, or None for exact attention.
        upcoming: the rung to try next, or None if the choice is made.
    """

    probed: dict[int, Tensor]
    rung: int | None
    upcoming: int | None


@dataclass(frozen=True)
class Choice:
    """The choice of a pilot for each kv head.

    Args:
        rungs: number of the rung, or None for exact attention.
        probed: numbers of the rungs that were tried on the pilot's tiles.
        spends: pairs that the choice cost, per query of the call; empty until they are counted.
    """

    rungs: tuple[int | None, ...]
    probed: tuple[tuple[int, ...], ...]
    spends: tuple[float, ...] = ()


def choose(pilot: Pilot, rungs: Sequence[Method], pairs: Sequence[float], aim: Aim) -> Choice:
    """Find for each kv head the cheapest rung that is likely to be certified.

    The middle rung is probed first. Its errors are extrapolated to the other rungs; if the chosen rung is far away, it is
    probed as well. The mean error of each head is raised by its standard error over tiles.

    Args:
        pilot: the tiles.
        rungs: methods by increasing cost.
        pairs: pairs that each rung lists per query.
        aim: requirements of the certificate.

    Returns:
        the choice.
    """
    searches = [_Search({}, None, len(rungs) // 2) for _ in range(pilot.problem.k.shape[1])]
    for probe in range(_PROBES):
        wanted: dict[int, list[int]] = {}
        for head, search in enumerate(searches):
            if search.upcoming is not None:
                wanted.setdefault(search.upcoming, []).append(head)
        for place, served in wanted.items():
            for head, errors in zip(served, pilot.errors(rungs[place], served).unbind(1), strict=True):
                probed = searches[head].probed | {place: _raised(errors, pilot.tiles)}
                searches[head] = _decide(probed, pairs, aim, last=probe + 1 == _PROBES)
    return Choice(tuple(each.rung for each in searches), tuple(tuple(each.probed) for each in searches))


def cheapest(
    errors: Float[Tensor, "batch group rows"],
    at: int,
    pairs: Sequence[float],
    aim: Aim,
    power: float = _POWER,
    first: int = 0,
) -> int | None:
    """Find the cheapest rung that is predicted to be certified, from the errors of another rung.

    Args:
        errors: row errors of one kv head's query heads.
        at: number of the rung that had these errors.
        pairs: pairs of each rung.
        aim: requirements of the certificate.
        power: errors fall like pairs^-power.
        first: first rung to consider.

    Returns:
        the number of the rung, or None if there is none.
    """
    for place in range(first, len(pairs)):
        if bool(aim.foresee(errors * (pairs[at] / pairs[place]) ** power, round(_ROOM * aim.rows(pairs[place]))).all()):
            return place
    return None


def _raised(errors: Tensor, tiles: int) -> Tensor:
    """Raise row errors so that their mean is one standard error higher, estimated from differences of neighbouring tiles."""
    by_tile = errors.unflatten(-1, (tiles, -1)).mean(-1)
    mean = by_tile.mean(-1, keepdim=True)
    # errors rise with position: the spread over all tiles would count this trend as noise
    deviation = by_tile.diff(dim=-1).square().mean(-1, keepdim=True).div(2).sqrt()
    return errors * (1 + deviation / math.sqrt(tiles) / mean.clamp(min=torch.finfo(mean.dtype).tiny))


def _decide(probed: dict[int, Tensor], pairs: Sequence[float], aim: Aim, *, last: bool) -> _Search:
    """Choose a rung, or the rung to probe next, from the last one probed."""
    *before, at = probed
    rung = cheapest(probed[at], at, pairs, aim, _fitted(probed, pairs) if before else _POWER)
    if last:
        return _Search(probed, rung, None)
    if rung is None:
        # the most expensive rung is probed unless even the steepest power would not suffice
        dearest = len(pairs) - 1
        hopeless = at == dearest or cheapest(probed[at], at, pairs, aim, _STEEP) is None
        return _Search(probed, None, None if hopeless else dearest)
    return _Search(probed, rung, None if abs(rung - at) <= 1 else rung)


def _fitted(probed: dict[int, Tensor], pairs: Sequence[float]) -> float:
    """Fit the power by which the mean error of the worst query head fell between the last two probes."""
    (one, before), (two, after) = list(probed.items())[-2:]
    mean = [float(errors.mean(-1).amax()) for errors in (before, after)]
    if not all(0 < each < math.inf for each in mean):
        return _POWER
    power = math.log(mean[0] / mean[1]) / math.log(pairs[two] / pairs[one])
    return min(max(power, _POWERS[0]), _POWERS[1])
