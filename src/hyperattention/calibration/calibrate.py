"""Calibrate a model: measure every candidate on a text, choose one for each layer and head, and measure the plan."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hyperattention.bench.rows import Row
from hyperattention.bench.timing import ignore
from hyperattention.calibration.allocate import allocate
from hyperattention.calibration.candidates import candidates, candidates_by_pairs
from hyperattention.calibration.choose import Chosen, choose
from hyperattention.calibration.conditions import describe
from hyperattention.calibration.crossover import find_crossing
from hyperattention.calibration.damage import Probe, weigh_heads
from hyperattention.calibration.journal import Journal
from hyperattention.calibration.measure import measure_layer, warm_up
from hyperattention.calibration.sample import sample_layer
from hyperattention.calibration.settings import CalibrationSettings
from hyperattention.files.fingerprint import fingerprint
from hyperattention.files.method_table import method_to_json
from hyperattention.files.plan import Measured, Plan
from hyperattention.files.timed import Crossing
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.by_layer import ByLayer
from hyperattention.methods.exact import Exact
from hyperattention.reference.call_recorder import CallInputs
from hyperattention.reference.model import LoadedModel
from hyperattention.reference.passes import run_pass
from hyperattention.reference.samples import EvaluationSample

# share of exact attention's pairs near which the weights of heads are measured
_PROBED = 1 / 20


def steps_of(loaded: LoadedModel, samples: Sequence[EvaluationSample], settings: CalibrationSettings | None = None) -> int:
    """Compute the largest number of steps that `calibrate` reports; layers that cannot be approximated report none."""
    model = fingerprint(loaded.model)
    weighed = 0 if settings is None or settings.pairs is None else model.num_layers * model.num_kv_heads
    return model.num_layers * (len(samples) + 1) + len(samples) + weighed


def calibrate(
    loaded: LoadedModel,
    samples: Sequence[EvaluationSample],
    settings: CalibrationSettings,
    journal: Path,
    on_step: Callable[[str], None] = ignore,
) -> Plan:
    """Choose a method for each layer and kv head of a model by measured error and time on this machine, or error and pairs.

    Each layer is measured on its own queries, keys and values, in a pass with exact attention, with one layer in memory at
    a time. With `pairs` a sample of the queries is measured, and one pass for each kv head tells what its errors do to the
    model's predictions. Then the complete plan is timed against exact attention at every length, and its loss is measured.
    Cost: for each document, one pass with every candidate in every layer, and one pass under the plan; for each layer,
    about the time of ten candidates for the times of the plan. With `pairs`: an eighth of that for candidates at 32,768
    tokens, and the passes of the heads. An interrupted calibration resumes from the journal.
    Guarantee: see `choose` and `allocate`. The tolerance does not bound the error of the model's output with all layers
    replaced; `Measured.added_nats` gives the measured effect on the loss.

    Args:
        loaded: the model.
        samples: texts of one length, for which the plan is made.
        settings: the settings of the calibration.
        journal: the file to which each measurement is written at once, for resuming; this function never deletes the file.
        on_step: called before each step with its name.

    Returns:
        the plan. Errors are those of `choose_methods`.
    """
    chosen, exact_nats = _choose_measured(loaded, samples, settings, journal, on_step, losses=True)
    layers = {layer: method for layer, (method, _) in chosen.items()}
    crossing = find_crossing(loaded, samples[0], layers, repeats=settings.repeats, on_step=on_step)
    added = _added_nats(loaded, samples, layers, exact_nats, settings.seed, on_step)
    return _plan(loaded, chosen, crossing, settings, describe(loaded, samples, settings), added)


def choose_methods(
    loaded: LoadedModel,
    samples: Sequence[EvaluationSample],
    settings: CalibrationSettings,
    journal: Path,
    on_step: Callable[[str], None] = ignore,
) -> Chosen:
    """Choose the methods that `calibrate` would choose, without timing them or measuring their loss together.

    Args:
        loaded: the model.
        samples: as in `calibrate`.
        settings: the settings of the calibration.
        journal: as in `calibrate`; either resumes what the other measured.
        on_step: called before each step with its name.

    Returns:
        for each layer, its methods and the error of each head.
    """
    return _choose_measured(loaded, samples, settings, journal, on_step, losses=False)[0]


def _choose_measured(
    loaded: LoadedModel,
    samples: Sequence[EvaluationSample],
    settings: CalibrationSettings,
    journal: Path,
    on_step: Callable[[str], None],
    *,
    losses: bool,
) -> tuple[Chosen, list[float]]:
    """Measure the candidates and choose.

    Returns:
        for each layer, its methods and errors; and the loss of each document with exact attention if `losses`.

    Raises:
        ValueError: if there is no text, none of the model's attention calls can be approximated, or the journal was written
            with other settings.
    """
    if not samples:
        raise ValueError("no text to calibrate on: give at least one sample")
    length = len(samples[0].tokens)
    ladder = settings.ladder or (candidates if settings.pairs is None else candidates_by_pairs)(length)
    about = describe(loaded, samples, settings)
    kept = Journal(journal, about | {"ladder": [method_to_json(method) for method in ladder]})
    exact_nats = _measure(loaded, samples, ladder, settings, kept, on_step, losses)
    if not kept.measurements:
        raise ValueError(
            f"no attention call of {loaded.name} can be approximated, so there is nothing to calibrate: the counter that "
            "`use` yields gives the reasons"
        )
    return _choose(loaded, samples[0], ladder, settings, kept, on_step), exact_nats


def _measure(
    loaded: LoadedModel,
    samples: Sequence[EvaluationSample],
    ladder: Sequence[AttentionMethod],
    settings: CalibrationSettings,
    kept: Journal,
    on_step: Callable[[str], None],
    losses: bool,
) -> list[float]:
    """Measure the layers that are not in the journal, in one pass with exact attention for each document.

    Returns:
        the loss a byte of each document with exact attention, from the same pass; without `losses`, a document whose layers
        are all in the journal is not read.
    """
    num_layers = fingerprint(loaded.model).num_layers
    warm, nats, exact, seed = False, [], Row("exact", "exact", Exact()), settings.seed
    for document, sample in enumerate(samples):

        def measure(call: CallInputs, document=document) -> None:
            nonlocal warm
            on_step(f"document {document + 1} of {len(samples)}: layer {call.layer}")
            if kept.has(document, call.layer):
                return
            if settings.pairs is not None:
                kept.add(sample_layer(call, ladder, document, seed))
                return
            if not warm:
                warm_up(call, ladder)
                warm = True
            kept.add(measure_layer(call, ladder, document, seed))

        if losses or not all(kept.has(document, layer) for layer in range(num_layers)):
            nats.append(run_pass(loaded, sample, exact, seed=seed + document, on_call=measure).nats_per_byte)
    return nats


def _choose(
    loaded: LoadedModel,
    sample: EvaluationSample,
    ladder: Sequence[AttentionMethod],
    settings: CalibrationSettings,
    kept: Journal,
    on_step: Callable[[str], None],
) -> Chosen:
    """Choose by the tolerance, or weigh the heads on the first document and spend the pairs."""
    if settings.pairs is None:
        assert settings.tolerance is not None
        return choose(kept.measurements, ladder, settings.tolerance)
    pairs, length = settings.pairs, len(sample.tokens)
    costs = [method.cost(length) for method in ladder]
    # the same for every number of pairs, so that a journal serves them all
    place = min(range(1, len(ladder)), key=lambda place: abs(costs[place].share_of_exact - _PROBED), default=0)
    weights = weigh_heads(Probe(loaded, sample, 0, ladder, place, settings.seed), kept, on_step)
    return allocate(kept.measurements, ladder, weights, pairs, length)


def _added_nats(
    loaded: LoadedModel,
    samples: Sequence[EvaluationSample],
    layers: dict[int, ByHead],
    exact_nats: Sequence[float],
    seed: int,
    on_step: Callable[[str], None],
) -> float:
    """Compute the added loss a byte of the second half, with the plan in all layers of the model."""
    plan, added = Row("plan", "plan", ByLayer(layers)), []
    for document, (sample, theirs) in enumerate(zip(samples, exact_nats, strict=True)):
        on_step(f"document {document + 1} of {len(samples)}: loss")
        added.append(run_pass(loaded, sample, plan, seed=seed + document).nats_per_byte - theirs)
    return statistics.fmean(added)


def _plan(
    loaded: LoadedModel,
    chosen: Chosen,
    crossing: Crossing,
    settings: CalibrationSettings,
    about: dict[str, Any],
    added: float,
) -> Plan:
    layers = {layer: method for layer, (method, _) in chosen.items()}
    errors = {layer: found for layer, (_, found) in chosen.items()}
    cost = ByLayer(layers).cost(about["length"])
    measured = Measured(
        **{name: value for name, value in about.items() if name != "model"},
        pairs_per_query=cost.pairs,
        exact_pairs_per_query=cost.exact_pairs,
        seconds=crossing.times[-1].plan,
        exact_seconds=crossing.times[-1].exact,
        added_nats=added,
        times=crossing.times,
    )
    # a plan for a number of pairs holds the tolerance that it needs
    tolerance = settings.tolerance or math.ceil(max(map(max, errors.values())) * 1000) / 1000
    return Plan(fingerprint(loaded.model), layers, errors, tolerance, crossing.keys, measured)
