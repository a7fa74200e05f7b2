"""Time a plan again, for example on another machine, without a new choice of its methods."""

from collections.abc import Callable
from dataclasses import replace

import torch

from hyperattention.bench.timing import ignore
from hyperattention.calibration.conditions import where
from hyperattention.calibration.crossover import find_crossing
from hyperattention.files.plan import Plan
from hyperattention.reference.model import LoadedModel
from hyperattention.reference.samples import EvaluationSample


def retime(
    plan: Plan, loaded: LoadedModel, sample: EvaluationSample, *, repeats: int = 5, on_step: Callable[[str], None] = ignore
) -> Plan:
    """Measure the crossover of a plan again, and replace its times.

    Methods, errors and added loss of the calibration are kept, because they do not depend on the load of the machine.
    Cost: one pass with exact attention, and `repeats` rounds of the plan and of exact attention at every length.

    Args:
        plan: the plan.
        loaded: the model of the plan.
        sample: a text of the same length as the calibration texts of the plan.
        repeats: rounds of interleaved timing.
        on_step: called with each layer before it is timed.

    Returns:
        the plan with the new times and crossover, and with the device and threads of this measurement.

    Raises:
        ValueError: if the plan is for another model, or the text has another length.
    """
    plan.check(loaded.model)
    length, wanted = len(sample.tokens), plan.measured.length
    if length != wanted:
        raise ValueError(
            f"a text of {length:,} tokens for a plan calibrated at {wanted:,}: give {wanted:,} tokens, or calibrate at "
            f"{length:,}"
        )
    crossing = find_crossing(loaded, sample, plan.layers, repeats=repeats, on_step=on_step)
    last = crossing.times[-1]
    measured = replace(
        plan.measured,
        device=where(loaded),
        threads=torch.get_num_threads(),
        seconds=last.plan,
        exact_seconds=last.exact,
        times=crossing.times,
    )
    return replace(plan, crossover=crossing.keys, measured=measured)
