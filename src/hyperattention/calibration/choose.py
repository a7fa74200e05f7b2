"""Choose a candidate for each layer and head out of what was measured."""

import statistics
from collections.abc import Sequence

from hyperattention.calibration.measure import Measurement
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead

# candidates this close to the quickest count as equally quick: from run to run times differ by as much
_TIE = 1.25
# only comparisons of counts matter, and none of ours depends on the length
_LENGTH = 65_536

Chosen = dict[int, tuple[ByHead, tuple[float, ...]]]


def choose(measurements: Sequence[Measurement], ladder: Sequence[AttentionMethod], tolerance: float) -> Chosen:
    """Give each kv head the quickest candidate that errs no more than the tolerance, exact attention where none does.

    Of candidates about as quick as the quickest, the one that lists the fewest pairs is taken: pairs are the same on every
    machine, so that noise in the times cannot spend them.

    The error of a head is its largest over the documents; the time of a candidate the median over all layers of one shape
    and all documents, for it depends on the shape alone.
    Source: none; budgets by head as in Feng et al., 2024 (arXiv:2407.11550), Ada-KV.   Differs: by measured output error
    and time, not by attention weights within a total.
    Guarantee: on the documents measured, with these draws and every other layer exact, no head errs more than the tolerance.

    Args:
        measurements: of every layer and document.
        ladder: the candidates, exact attention first.
        tolerance: the largest mean relative error allowed.

    Returns:
        for each layer its methods, and the errors they had.
    """
    by_layer: dict[int, list[Measurement]] = {}
    for each in measurements:
        by_layer.setdefault(each.layer, []).append(each)
    seconds = median_seconds(measurements)
    chosen: Chosen = {}
    for layer, found in sorted(by_layer.items()):
        cost = seconds[found[0].shape]
        places = []
        for head in range(found[0].shape[1]):
            errors = [max(each.errors[place][head] for each in found) for place in range(len(ladder))]
            # exact attention comes first, whatever rounding makes of its error
            allowed = [0, *(place for place in range(1, len(ladder)) if errors[place] <= tolerance)]
            best = _quickest(allowed, cost, ladder)
            places.append((ladder[best], errors[best]))
        methods, errors = zip(*places, strict=True)
        chosen[layer] = (ByHead(methods), errors)
    return chosen


def _quickest(allowed: Sequence[int], seconds: Sequence[float], ladder: Sequence[AttentionMethod]) -> int:
    least = min(seconds[place] for place in allowed)
    close = [place for place in allowed if seconds[place] <= _TIE * least]
    return min(close, key=lambda place: ladder[place].cost(_LENGTH).pairs)


def median_seconds(measurements: Sequence[Measurement]) -> dict[tuple[int, int, int, int], list[float]]:
    """Take the median time of each candidate over the layers of one shape, and the documents.

    Args:
        measurements: of layers and documents.

    Returns:
        seconds of each candidate, by shape.
    """
    by_shape: dict[tuple[int, int, int, int], list[Measurement]] = {}
    for each in measurements:
        by_shape.setdefault(each.shape, []).append(each)
    return {
        shape: [statistics.median(times) for times in zip(*(each.seconds for each in found), strict=True)]
        for shape, found in by_shape.items()
    }
