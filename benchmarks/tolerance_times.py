"""Times of tolerance.py: what deciding costs, and where a rung of the default ladder takes as long as exact attention."""

import time
from collections.abc import Callable, Iterator

from claims import Record, at_most, figure
from tolerance_inputs import KV_HEADS, Inputs, Name, structured_case

from hyperattention.bench.case import Case
from hyperattention.bench.timing import interleave
from hyperattention.error.tolerance.ladder import ALIKE_CROSSOVER, default_ladder
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact
from hyperattention.select.draw_alike import DrawAlike

# draws of the rung whose crossover is `ALIKE_CROSSOVER`, and of one with fewer and one with more
_DRAWS = (880, 1760, 3520)


def cheapest_methods(case: Inputs, tolerances: tuple[float, ...]) -> dict[float, tuple[AttentionMethod, ...]]:
    """What an oracle would run: for each kv head the cheapest rung whose true mean error is within the tolerance."""
    length = case.name.length
    ladder = default_ladder(length)
    found: dict[float, list[AttentionMethod]] = {tolerance: [Exact()] * KV_HEADS for tolerance in tolerances}
    for rung in reversed(ladder.rungs):
        cost = rung.cost(length)
        if cost.pairs + cost.selection_pairs > ladder.worth * cost.exact_pairs:
            continue
        worst = case.errors(case.attend(rung)).unflatten(1, (KV_HEADS, -1)).amax((0, 2))
        for tolerance, methods in found.items():
            for head in range(KV_HEADS):
                # from dear to cheap: one that fails ends the descent of its head, in all that is cheaper
                if worst[head] <= tolerance:
                    methods[head] = rung
    return {tolerance: tuple(methods) for tolerance, methods in found.items()}


def measure_overhead(length: int, repeats: int, tolerances: tuple[float, ...]) -> Iterator[Record]:
    """Time a call against the methods it chose, run directly, and against the cheapest that are truly within."""
    case = structured_case(Name("scattered", 0, length))
    oracles = cheapest_methods(case, tolerances)
    for tolerance in tolerances:
        _, report = case.within(tolerance)
        calls: dict[str, Callable[[], object]] = {
            "tolerance": lambda tolerance=tolerance: case.within(tolerance),
            "chosen": case.by_head(report.methods),
            "oracle": case.by_head(oracles[tolerance]),
        }
        times = interleave(calls, repeats)
        medians = {name: timing.median for name, timing in times.items()}
        over = {name: 100 * (medians["tolerance"] / medians[name] - 1) for name in ("chosen", "oracle")}
        beside = f"{over['oracle']:.0f} % against the cheapest rungs truly within; {report}".replace("\n", "; ")
        claim = f"cost of deciding, tolerance {tolerance:g}, {length:,} tokens, against its own rungs run directly"
        yield at_most(claim, over["chosen"], 25, beside, " %")
        yield {
            "part": "overhead", "inputs": "scattered", "length": length, "tolerance": tolerance, "median_s": medians,
            "quartiles_s": {name: timing.quartiles for name, timing in times.items()}, "over_percent": over,
            "chosen": [repr(method) for method in report.methods], "share_of_pairs": report.share_of_pairs,
            "oracle": [repr(method) for method in oracles[tolerance]],
        }  # fmt: skip


def measure_crossover(lengths: tuple[int, ...], repeats: int) -> Iterator[Record]:
    """Time rungs against exact attention: processor time, which other work on the machine disturbs less."""
    for length in lengths:
        case = Case(length, heads=4)
        inputs = case.structured_inputs()
        methods = {"exact": Exact()} | {
            f"{rung.stages[-1].num} draws": rung
            for rung in default_ladder(max(length, ALIKE_CROSSOVER)).rungs
            if isinstance(rung.stages[-1], DrawAlike) and rung.stages[-1].num in _DRAWS
        }
        times: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(repeats):
            for name, method in methods.items():
                began = time.process_time()
                case.call(method, inputs)()
                times[name].append(time.process_time() - began)
        shares = {}
        for name, method in methods.items():
            cost = method.cost(length)
            shares[name] = (cost.pairs + cost.selection_pairs) / cost.exact_pairs
        yield {
            "part": "crossover", "inputs": "scattered", "length": length, "heads": 4, "kv_heads": 1, "cpu_s": times,
            "methods": {name: repr(method) for name, method in methods.items()}, "share_of_pairs": shares,
        }  # fmt: skip
        if length == ALIKE_CROSSOVER:
            ratio = min(times["exact"]) / min(times["1760 draws"])
            yield figure(
                f"processor time, 1,760 draws for alike queries at {length:,} tokens, whose share of pairs a rung may cost",
                "none",
                ratio,
                True,
                f"{ratio:.2f}x SDPA's speed",
                f"share {shares['1760 draws']:.2f} of exact's pairs",
            )
