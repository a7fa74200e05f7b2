"""Scatterbrain: error against the temperature of softmax at equal cost, what helps, and a model at 32,768 tokens.

    python benchmarks/scatterbrain.py                       # fifteen minutes on one thread; resumes where it stopped
    python benchmarks/scatterbrain.py --parts temperature helps norms     # without the model at 32,768 tokens: six minutes
    python benchmarks/scatterbrain.py --quick --out /tmp/s.jsonl          # one minute, to see that the script runs
    python benchmarks/scatterbrain.py --write               # tables and picture from the records; measures nothing

*temperature*: scores are multiplied by a factor, so that softmax is flat at small factors and sharp at large ones. Methods
cost as many pairs: sparse lists alone, random features alone, both, and uniform draws in place of features. *helps*: what
makes the random features less noisy. *norms*: the exponent z = scale ||q + k||^2 of their relative variance, with keys or
both sides centred. *model*: loss, retrieval, error and time of the reference model with all layers replaced, by
`long_context.measure`. Inputs are structured ones, and the reference model's own queries, keys and values on a held-out
document. Every line is written at once.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from long_context import METHODS, measure
from scatterbrain_inputs import Call, Inputs, exponents
from scatterbrain_table import PICTURE, RECORDS, draw, read, write
from torch import Tensor

from hyperattention import AttentionMethod, Draw, Method, Scatterbrain, Sinks, TopBlocks, Window
from hyperattention.files.records import environment, plain
from hyperattention.reference.model import load_reference
from hyperattention.reference.samples import samples_of_documents
from hyperattention.reference.text import held_out_documents

NEAR = Sinks(16), Window(128)
# 512 pairs a query each: a feature counts as a pair, and a listed key that is subtracted counts again by its features
COMPARED: dict[str, AttentionMethod] = {
    "sparse": Method(*NEAR, TopBlocks(19, 16)),
    "low rank": Scatterbrain(num_features=512),
    "window and low rank": Scatterbrain(*NEAR, num_features=304),
    "blocks and low rank": Scatterbrain(*NEAR, TopBlocks(4, 16), num_features=138),
    "window and uniform draws": Method(*NEAR, Draw(304)),
}
HELPS: dict[str, AttentionMethod] = {
    "window alone": Method(*NEAR),
    **{
        f"{num} features, spread {spread:g}, {'keys centred' if centred else 'as they are'}": Scatterbrain(
            *NEAR, num_features=num, spread=spread, centred=centred
        )
        for num, spread, centred in (
            (64, 1.0, True), (256, 1.0, True), (768, 1.0, True), (256, 1.0, False), (256, 1.5, True), (256, 2.0, True),
            (256, 3.0, True),
        )
    },
}  # fmt: skip
FACTORS = tuple(2.0**power for power in range(-6, 2))
# as many pairs as the default, a support alone, and the default for its time; records/long_context.jsonl has the other rows
MODEL: dict[str, AttentionMethod] = {
    "scatterbrain": METHODS["scatterbrain"],
    "window and low rank": Scatterbrain(Sinks(16), Window(640), num_features=256),
    "default": METHODS["default"],
    # two thirds of the default's time, and about all of it
    "scatterbrain, 56 blocks": Scatterbrain(Sinks(16), Window(192), TopBlocks(56, 16), num_features=64),
    "scatterbrain, 160 blocks": Scatterbrain(Sinks(16), Window(192), TopBlocks(160, 16), num_features=64),
    "support of scatterbrain alone": Method(Sinks(16), Window(192), TopBlocks(20, 16)),
}


@dataclass(frozen=True)
class Plan:
    length: int = 4096
    seeds: int = 3
    factors: tuple[float, ...] = FACTORS
    helped: tuple[float, ...] = (1 / 16, 1 / 4, 1.0)
    rows: int = 128
    model_length: int = 32_768
    audit_rows: int = 16


QUICK = Plan(2048, 1, (1 / 16, 1.0), (1 / 4,), 32, 2048, 8)


def compare(
    inputs: str, calls: tuple[Call, ...], methods: Mapping[str, AttentionMethod], factors: tuple[float, ...], plan: Plan
) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """Yield each measurement: what tells it from others, and how it is made."""
    for factor in factors:
        # computed when the first method of this factor is measured
        known: list[list[tuple[Tensor, Tensor, float]]] = []
        for name, method in methods.items():
            for seed in range(plan.seeds if method.complete else 1):
                key = {"inputs": inputs, "length": plan.length, "factor": factor, "name": name, "method": repr(method),
                       "seed": seed}  # fmt: skip
                yield (
                    key,
                    lambda method=method, seed=seed, factor=factor, known=known: errors_of(
                        calls, method, factor, seed, plan, known
                    ),
                )


def errors_of(
    calls: tuple[Call, ...],
    method: AttentionMethod,
    factor: float,
    seed: int,
    plan: Plan,
    known: list[list[tuple[Tensor, Tensor, float]]],
) -> dict:
    if not known:
        known.append([call.exact(factor, plan.rows) for call in calls])
    cost = method.cost(plan.length)
    assert cost.share_of_exact < 1, f"{method!r} lists {cost.pairs} pairs, exact attention {cost.exact_pairs}"
    errors = [call.error(method, factor, exact, seed) for call, exact in zip(calls, known[0], strict=True)]
    found = {
        "error": sum(errors) / len(errors), "errors": errors, "entropy": sum(x[2] for x in known[0]) / len(errors),
        "pairs": cost.pairs, "share_of_exact": cost.share_of_exact,
    }  # fmt: skip
    if isinstance(method, Scatterbrain) and not all(stage.by_place for stage in method.stages):
        found["clamped"] = sum(call.clamped(method, factor, seed) for call in calls) / len(calls)
    return found


def norms(inputs: str, calls: tuple[Call, ...], plan: Plan) -> Iterator[tuple[dict, Callable[[], dict]]]:
    for call in calls:
        key = {"inputs": inputs, "length": plan.length, "layer": call.layer}
        yield key, lambda call=call: exponents(call)


def of_model(plan: Plan) -> Iterator[tuple[dict, Callable[[], dict]]]:
    loaded = load_reference()
    sample = samples_of_documents(held_out_documents(plan.model_length, 10**6))[0]
    for name, method in MODEL.items():
        key = {"inputs": "reference model", "length": plan.model_length, "document": 0, "name": name,
               "method": repr(method), "seed": 0}  # fmt: skip
        yield key, lambda method=method: timed(lambda: dict(measure(loaded, sample, method, 0, plan.audit_rows)))


def timed(run: Callable[[], dict]) -> dict:
    """Add the processor time of the pass, audit and all layers: others may use the machine meanwhile."""
    began = time.process_time()
    found = run()
    return found | {"processor_seconds": time.process_time() - began}


def parts(plan: Plan) -> dict[str, Callable[[], Iterator[tuple[dict, Callable[[], dict]]]]]:
    inputs = Inputs(plan.length)

    def on_both(of: Callable[[str, tuple[Call, ...]], Iterator]) -> Iterator:
        for name, calls in inputs.named().items():
            yield from of(name, calls)

    return {
        "temperature": lambda: on_both(lambda name, calls: compare(name, calls, COMPARED, plan.factors, plan)),
        "helps": lambda: compare("reference model", inputs.model, HELPS, plan.helped, plan),
        "norms": lambda: on_both(lambda name, calls: norms(name, calls, plan)),
        "model": lambda: of_model(plan),
    }


def run(plan: Plan, chosen: list[str], out: Path) -> None:
    done = {json.dumps([line["part"], line["key"]]) for line in read(out)}
    for part in chosen:
        for key, made in parts(plan)[part]():
            if json.dumps([part, key]) in done:
                continue
            found = made()
            line = {"kind": "scatterbrain", "part": part, "key": key, "found": plain(found)} | environment()
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            shown = {name: value for name, value in found.items() if name in ("error", "nats_per_byte", "retrieval")}
            print(part, *key.values(), shown, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[*parts(QUICK)], choices=[*parts(QUICK)])
    parser.add_argument("--quick", action="store_true", help="short inputs, one seed: says nothing")
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/relatives.md, and the picture")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    if options.write:
        write(read(options.out))
        draw(read(options.out), options.picture)
        return
    run(QUICK if options.quick else Plan(), options.parts, options.out)


if __name__ == "__main__":
    main()
