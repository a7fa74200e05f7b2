"""Spend a number of pairs where they keep a model's predictions best."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from hyperattention.calibration.choose import Chosen
from hyperattention.calibration.damage import Weights
from hyperattention.calibration.measure import Measurement
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead

# number of a candidate in the ladder, by layer and kv head
_Places = dict[tuple[int, int], int]
# predicted damage of each candidate, by layer and kv head
_Damages = dict[tuple[int, int], list[float]]


def allocate(
    measurements: Sequence[Measurement],
    ladder: Sequence[AttentionMethod],
    weights: Weights,
    pairs: int,
    length: int,
) -> Chosen:
    """Choose a candidate for each kv head, so that the predicted damage is small and the mean of their pairs allowed.

    minimise  sum_h weight_h error_h(candidate_h)   with   mean_h pairs(candidate_h) <= pairs;   error_h: mean over documents

    Every head begins with the cheapest candidate. Then the step that saves most for each further pair is taken, again and
    again, among candidates on the lower convex hull of damage over pairs; a step that costs too much is left out, and
    smaller ones follow, on the hull and then beside it.
    Source: none; marginal analysis, and budgets by head as in Feng et al., 2024 (arXiv:2407.11550), Ada-KV.   Differs:
    methods in place of cache sizes, and measured damage in place of attention weights.
    Guarantee: the number of pairs. The damage is predicted as if heads added up.

    Args:
        measurements: the measurements of every layer and document, with squared errors.
        ladder: the candidates, exact attention first.
        weights: the weight of each head.
        pairs: keys that a query may list, in the mean over the heads.
        length: tokens of the documents, at which pairs are counted.

    Returns:
        for each layer, the chosen methods and their errors.
    """
    costs = [method.cost(length).pairs for method in ladder]
    by_layer: dict[int, list[Measurement]] = {}
    for each in measurements:
        by_layer.setdefault(each.layer, []).append(each)
    damages = {
        (layer, head): _damage(found, head, weight)
        for layer, found in sorted(by_layer.items())
        for head, weight in enumerate(weights[layer])
    }
    places = _spend(damages, costs, pairs * len(damages))
    chosen: Chosen = {}
    for layer, found in sorted(by_layer.items()):
        own = [places[layer, head] for head in range(len(weights[layer]))]
        errors = tuple(max(each.errors[place][head] for each in found) for head, place in enumerate(own))
        chosen[layer] = (ByHead(tuple(ladder[place] for place in own)), errors)
    return chosen


def _damage(found: Sequence[Measurement], head: int, weight: float) -> list[float]:
    """Predict what each candidate does to the model's predictions, in nats a token."""
    by_candidate = zip(*(each.squares for each in found), strict=True)
    damage = [weight * statistics.fmean(each[head] for each in squares) for squares in by_candidate]
    return [math.inf if math.isnan(each) else each for each in damage]


def _hull(costs: Sequence[float], damage: Sequence[float]) -> list[tuple[int, float]]:
    """List the candidates of the lower convex hull, by increasing pairs, and the damage of each."""
    hull: list[tuple[int, float]] = []
    for place in sorted(range(len(costs)), key=lambda place: (costs[place], damage[place])):
        if hull and not damage[place] < hull[-1][1]:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1], costs) <= _gain(hull[-1], (place, damage[place]), costs):
            hull.pop()
        hull.append((place, damage[place]))
    return hull


def _gain(begin: tuple[int, float], end: tuple[int, float], costs: Sequence[float]) -> float:
    """Damage saved for each further pair."""
    return (begin[1] - end[1]) / (costs[end[0]] - costs[begin[0]])


def _spend(damages: _Damages, costs: Sequence[float], allowed: int) -> _Places:
    """Take the steps of the hulls by gain, as far as the pairs allow, and then whatever else still helps.

    Args:
        damages: for each head, what each candidate does.
        costs: pairs of each candidate.
        allowed: pairs of all heads together.

    Returns:
        the candidate of each head.

    Raises:
        ValueError: if even the cheapest candidates list more pairs.
    """
    hulls = {head: _hull(costs, damage) for head, damage in damages.items()}
    places = {head: hull[0][0] for head, hull in hulls.items()}
    left = allowed - sum(costs[place] for place in places.values())
    if left < 0:
        raise ValueError(
            f"{allowed / len(hulls):g} pairs a query: the cheapest candidates list {(allowed - left) / len(hulls):g} on "
            "average; allow at least as many"
        )
    steps = sorted(
        ((_gain(begin, end, costs), head, end[0]) for head, hull in hulls.items() for begin, end in pairwise(hull)),
        key=lambda step: -step[0],
    )
    for _, head, place in steps:
        further = costs[place] - costs[places[head]]
        if further <= left:
            places[head], left = place, left - further
    while better := _best_left(damages, costs, places, left):
        head, place = better
        places[head], left = place, left - (costs[place] - costs[places[head]])
    return places


def _best_left(
    damages: _Damages, costs: Sequence[float], places: _Places, left: float
) -> tuple[tuple[int, int], int] | None:
    """Find the change of one head that saves most damage for the pairs that are left; None if no change saves any."""
    saved = [
        (damage[places[head]] - each, head, place)
        for head, damage in damages.items()
        for place, each in enumerate(damage)
        if each < damage[places[head]] and costs[place] - costs[places[head]] <= left
    ]
    _, head, place = max(saved, default=(0.0, (0, 0), None))
    return None if place is None else (head, place)
