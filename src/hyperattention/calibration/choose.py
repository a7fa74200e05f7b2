"""Choose a candidate for each layer and head from the measurements."""

import statistics
from collections.abc import Sequence

from hyperattention.calibration.measure import Measurement
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead

# candidates within this factor of the fastest count as equally fast, because times vary as much from run to run
_TIE = 1.25
# only comparisons of counts matter, and for these candidates no comparison depends on the length
_LENGTH = 65_536

Chosen = dict[int, tuple[ByHead, tuple[float, ...]]]


def choose(measurements: Sequence[Measurement], ladder: Sequence[AttentionMethod], tolerance: float) -> Chosen:
    """Choose for each kv head the fastest candidate within the tolerance, or exact attention if there is none.

    Of the candidates that are about as fast as the fastest, the one with the fewest pairs is chosen. Numbers of pairs are
    the same on every machine, so noise in the times does not increase them.

    The error of a head is its largest error over the documents. The time of a candidate is the median over all layers of
    one shape and all documents, because the time depends only on the shape.
    Source: none; budgets by head as in Feng et al., 2024 (arXiv:2407.11550), Ada-KV.   Differs: chooses by measured output
    error and time, not by attention weights within a total budget.
    Guarantee: on the calibration documents, with these draws and all other layers exact, the error of every head is within
    the tolerance.

    Args:
        measurements: the measurements of every layer and document.
        ladder: the candidates, exact attention first.
        tolerance: the largest allowed mean relative error.

    Returns:
        for each layer, the chosen methods and their errors.
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
            # place 0 is exact attention, which is allowed for any rounding error
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
    """Compute the median time of each candidate over the layers of one shape and the documents.

    Args:
        measurements: the measurements of layers and documents.

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
