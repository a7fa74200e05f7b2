"""Time a plan again, on another day or another machine, without choosing its methods anew."""

from collections.abc import Callable
from dataclasses import replace

import torch

from hyperattention.bench.timing import ignore
from hyperattention.calibration.calibrate import where
from hyperattention.calibration.crossover import find_crossing
from hyperattention.files.plan import Plan
from hyperattention.reference.model import LoadedModel
from hyperattention.reference.samples import EvaluationSample


def retime(
    plan: Plan, loaded: LoadedModel, sample: EvaluationSample, *, repeats: int = 5, on_step: Callable[[str], None] = ignore
) -> Plan:
    """Measure once more from how many keys on a plan pays, and take the new times in place of the old.

    Methods, errors and added loss are those of the calibration: they do not depend on how busy a machine is.
    Cost: one pass with exact attention, and `repeats` rounds of the plan and of exact attention at every length.

    Args:
        plan: the plan.
        loaded: its model.
        sample: a text as long as those that the plan was calibrated on.
        repeats: rounds of interleaved timing.
        on_step: told each layer before it is timed.

    Returns:
        the plan with another crossover, and with the device and threads that it was timed on.

    Raises:
        ValueError: if the model is not the plan's, or the text has another length.
    """
    plan.check(loaded.model)
    length, wanted = len(sample.tokens), plan.measured.length
    if length != wanted:
        raise ValueError(
            f"a text of {length:,} tokens for a plan calibrated at {wanted:,}: give {wanted:,}, or calibrate at {length:,}"
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
