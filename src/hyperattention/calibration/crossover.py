"""From how many keys on a plan is faster than exact attention, measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from hyperattention.bench.timing import interleave
from hyperattention.calibration.measure import run_on
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.exact import Exact
from hyperattention.reference.model import Judged
from hyperattention.reference.passes import watch_exact
from hyperattention.reference.samples import Sample
from hyperattention.reference.watch import CallInputs

_SHORTEST = 256


@dataclass(frozen=True)
class Crossing:
    """Times of a plan and of exact attention at every length, in all the plan's layers together.

    Args:
        lengths: ascending; the last is that of the text.
        plan: seconds at each length.
        exact: seconds at each length.
    """

    lengths: tuple[int, ...]
    plan: tuple[float, ...]
    exact: tuple[float, ...]

    @property
    def keys(self) -> int | None:
        """The shortest length from which on the plan was never slower; None if it was slower at the longest."""
        pays = None
        for length, plan, exact in reversed(list(zip(self.lengths, self.plan, self.exact, strict=True))):
            if plan > exact:
                break
            pays = length
        return pays


def find_crossing(
    judged: Judged,
    sample: Sample,
    layers: Mapping[int, ByHead],
    *,
    repeats: int,
    on_step: Callable[[str], None],
) -> Crossing:
    """Time a plan and exact attention in turn, on the beginnings of a text: powers of two, and all of it.

    Args:
        judged: the model.
        sample: the text.
        layers: the methods of each layer.
        repeats: rounds of interleaved timing.
        on_step: told each layer before it is timed.

    Returns:
        the times.
    """
    total = len(sample.tokens)
    lengths = (*(length for power in range(20) if (length := _SHORTEST << power) < total), total)
    plan, exact = ([0.0] * len(lengths) for _ in range(2))

    def time_layer(call: CallInputs) -> None:
        method = layers.get(call.layer)
        if method is None:
            return
        on_step(f"crossover: layer {call.layer}")
        for place, length in enumerate(lengths):
            q, k, v = (x[:, :, :length].contiguous() for x in (call.q, call.k, call.v))
            part = replace(call, q=q, k=k, v=v)
            calls = {"plan": lambda part=part: run_on(part, method), "exact": lambda part=part: run_on(part, Exact())}
            for run in calls.values():
                run()
            timings = interleave(calls, repeats)
            plan[place] += timings["plan"].median
            exact[place] += timings["exact"].median

    watch_exact(judged, sample, time_layer)
    return Crossing(lengths, tuple(plan), tuple(exact))
