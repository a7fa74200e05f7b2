"""Units of sums: powers of two that keep each row's sums in range, whatever the scales of keys that it does not see."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.kernels.feature.keys import Keys
from hyperattention.kernels.feature.plan import Plan, Step
from hyperattention.kernels.feature.scales import finite

# powers of two by which the largest scale of a step may exceed that of a row's own keys before each row gets its own base
FAR_ABOVE = 24.0


@dataclass(frozen=True)
class Course:
    """A plan with units: what sums of each row are multiples of.

    Args:
        plan: the order of the rows.
        base: exponent of the unit of each row's sums, ``[lists, rows]``; -inf if a row sees no key.
        top: largest exponent among the keys of each row, in the plan's order.
        tops: largest exponent among leading keys, in the plan's order, ``[lists, keys + 1]``; 0 where all are -inf.
        steps: the steps; those whose rows need a base each have one block.
        apart: which steps these are.
        moved: before which steps the unit of the state changes.
    """

    plan: Plan
    base: Tensor
    top: Tensor
    tops: Tensor
    steps: list[Step]
    apart: list[bool]
    moved: list[bool]


def course_of(keys: Keys, plan: Plan) -> Course:
    """Choose a unit for each row's sums: the largest scale of its step's keys, or that of its own keys if far below.

    Args:
        keys: the keys.
        plan: the order of the rows.

    Returns:
        the course.
    """
    exponent, limit = keys.scales.exponent, plan.limit
    exponent = exponent.flip(1) if plan.mirrored else exponent
    largest = exponent if keys.alike else exponent.cummax(1)[0]
    tops = torch.cat([exponent.new_full((len(exponent), 1), -torch.inf), largest], 1)
    top = tops[:, limit]
    base, apart = (top, [False] * len(plan.steps)) if keys.alike else _bases(tops, top, plan)
    if plan.order is not None:
        base = torch.empty_like(base).index_copy_(1, plan.order, base)
    elif plan.mirrored:
        base = base.flip(1)
    pieces = [(x, flag) for step, flag in zip(plan.steps, apart, strict=True) for x in step.pieces(flag)]
    steps, flags = [x for x, _ in pieces], [flag for _, flag in pieces]
    tops = finite(tops)
    at = torch.tensor([0, *(unit_at(*x) for x in pieces)], dtype=torch.int64, device=limit.device)
    moved = (tops[:, at].diff(dim=1) != 0).any(0).tolist()
    return Course(plan, base, top, tops, steps, flags, moved)


def _bases(tops: Tensor, top: Tensor, plan: Plan) -> tuple[Tensor, list[bool]]:
    """Return the exponents of units in the plan's order, and which steps' rows need one each."""
    sizes = [[x.rows.stop - x.rows.start, x.near.stop] for x in plan.steps]
    lengths, ends = torch.tensor(sizes, dtype=torch.int64, device=top.device).view(-1, 2).unbind(1)
    base = tops[:, ends].repeat_interleave(lengths, 1)
    far = ((base - top > FAR_ABOVE) & (top > -torch.inf)).any(0)
    count = torch.cat([lengths.new_zeros(1), far.cumsum(0)])
    edge = lengths.cumsum(0)
    apart = count[edge] > count[edge - lengths]
    base = torch.where(apart.repeat_interleave(lengths), top, base).masked_fill(top == -torch.inf, -torch.inf)
    return base, apart.tolist()


def unit_at(step: Step, apart: bool) -> int:
    """Return the number of leading keys whose largest scale is the unit of a step's state.

    Args:
        step: the step.
        apart: whether its rows need a base each.

    Returns:
        the number.
    """
    return step.near.start if apart else step.near.stop
