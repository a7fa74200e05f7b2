"""The measured crossover of a plan: the number of keys from which it is faster than exact attention."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from hyperattention.bench.timing import Timing, interleave
from hyperattention.calibration.measure import run_on
from hyperattention.files.timed import Crossing, Timed
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.exact import Exact
from hyperattention.reference.call_recorder import CallInputs
from hyperattention.reference.model import LoadedModel
from hyperattention.reference.passes import watch_exact
from hyperattention.reference.samples import EvaluationSample

_SHORTEST = 256


def find_crossing(
    loaded: LoadedModel,
    sample: EvaluationSample,
    layers: Mapping[int, ByHead],
    *,
    repeats: int,
    on_step: Callable[[str], None],
) -> Crossing:
    """Time a plan and exact attention alternately, on the first tokens of a text: powers of two, and the complete text.

    Args:
        loaded: the model.
        sample: the text.
        layers: the methods of each layer.
        repeats: rounds of interleaved timing.
        on_step: called with each layer before it is timed.

    Returns:
        the times.

    Raises:
        ValueError: if no attention call of these layers can be approximated.
    """
    total = len(sample.tokens)
    lengths = (*(length for power in range(20) if (length := _SHORTEST << power) < total), total)
    taken: dict[int, list[tuple[Timing, Timing]]] = {length: [] for length in lengths}

    def time_layer(call: CallInputs) -> None:
        method = layers.get(call.layer)
        if method is None:
            return
        on_step(f"crossover: layer {call.layer}")
        for length in lengths:
            taken[length].append(_in_turn(call, method, length, repeats))

    watch_exact(loaded, sample, time_layer)
    if not taken[total]:
        raise ValueError(
            f"no attention call of the layers {sorted(layers)} can be approximated here, so there is nothing to time: the "
            "counter that `use` yields gives the reasons"
        )
    return Crossing(tuple(_together(length, timings) for length, timings in taken.items()))


def _in_turn(call: CallInputs, method: ByHead, length: int, repeats: int) -> tuple[Timing, Timing]:
    """Time a layer's method and exact attention on the first tokens of a call, after one warm-up run of each."""
    q, k, v = (x[:, :, :length].contiguous() for x in (call.q, call.k, call.v))
    part, served = replace(call, q=q, k=k, v=v), set(method.methods)
    calls = {"exact": lambda: run_on(part, Exact())}
    # if every head runs exactly, both would be the same call, so it is timed once
    calls |= {} if served == {Exact()} else {"plan": lambda: run_on(part, method)}
    for run in calls.values():
        run()
    timings = interleave(calls, repeats)
    return timings.get("plan", timings["exact"]), timings["exact"]


def _together(length: int, layers: list[tuple[Timing, Timing]]) -> Timed:
    """Sum the times of all layers: medians for the crossover, single rounds for the spread."""
    by_method = list(zip(*layers, strict=True))
    plan, exact = (sum(each.median for each in timings) for timings in by_method)
    rounds = ([sum(spent) for spent in zip(*(each.seconds for each in timings), strict=True)] for timings in by_method)
    ratios = [theirs / ours for ours, theirs in zip(*rounds, strict=True)]
    return Timed(length, plan, exact, min(ratios), max(ratios))
