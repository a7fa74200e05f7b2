"""Weighted sums over the leading keys of each row: a state for the keys that a block of rows shares, pairs for the rest.

Rows are processed in the order of their limits, some blocks at a time: keys before a block are in its state, and the few
keys between the limits of its rows are weighted pair by pair.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.kernels.feature.plan import Plan, Step
from hyperattention.kernels.feature.powers import Power
from hyperattention.kernels.feature.scales import Scales, finite

# powers of two by which the largest scale of a step may exceed that of a row's own keys before each row gets its own base
FAR_ABOVE = 24.0


@dataclass(frozen=True)
class Keys:
    """Keys in order, and what each adds to a sum.

    Args:
        key: ``[lists, keys, features]``.
        value: ``[lists, keys, width - 1]``.
        last: one more number of each value, ``[lists, keys]``.
        scales: of each key, ``[lists, keys]``.
    """

    key: Tensor
    value: Tensor
    last: Tensor
    scales: Scales

    def of(self, lists: slice, keys: slice) -> "Keys":
        """Select some keys of some lists."""
        at = lists, keys
        return Keys(self.key[at], self.value[at], self.last[at], self.scales[at])

    def ordered(self, order: Tensor) -> "Keys":
        """Put the keys of all lists into another order."""
        parts = self.key, self.value, self.last, self.scales.factor, self.scales.exponent
        key, value, last, factor, exponent = (x.index_select(1, order) for x in parts)
        return Keys(key, value, last, Scales(factor, exponent))

    def scaled(self, scale: Tensor) -> Tensor:
        """Return values with their last number, times a scale, ``[lists, keys, width]``."""
        result = scale.new_empty(*scale.shape, self.value.shape[-1] + 1)
        torch.mul(self.value, scale[..., None], out=result[..., :-1])
        torch.mul(self.last, scale, out=result[..., -1])
        return result


@dataclass(frozen=True)
class Block:
    """The rows of a step, and all they need; blocks of all lists are one axis, ``lists * blocks``.

    Args:
        lists: the lists.
        rows: numbers of the rows: a slice, or an index.
        size: rows of each block.
        state: sum over the keys before the block of 2^-base exp(log scale) expanded key value^T, ``[.., expanded, width]``.
        decay: 2^(base of the state - base of each row), ``[.., rows, 1]``; None for 1.
        key: the near keys, ``[.., near, features]``; no keys if rows see none beyond the state.
        value: their scaled values, ``[.., near, width]``.
        weight: what each pair's product is multiplied by, 0 if hidden; ``[.., rows, near]``; None if row i sees i + 1.
    """

    lists: slice
    rows: slice | Tensor
    size: int
    state: Tensor
    decay: Tensor | None
    key: Tensor
    value: Tensor
    weight: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """Select the rows of ``[lists, rows, ...]``, block by block, in the dtype of sums."""
        x = x[self.lists]
        x = x[:, self.rows] if isinstance(self.rows, slice) else x.index_select(1, self.rows)
        return x.to(self.state.dtype).reshape(-1, self.size, *x.shape[2:])

    def put(self, x: Tensor, scale: Tensor | None, target: Tensor) -> None:
        """Write rows, block by block, times the scale of each if given, to their places in ``[lists, rows, ...]``."""
        target = target[self.lists]
        x = x.reshape(target.shape[0], -1, x.shape[2])
        scale = None if scale is None else scale.view(target.shape[0], -1, 1)
        if not isinstance(self.rows, slice):
            target.index_copy_(1, self.rows, (x if scale is None else x * scale).to(target.dtype))
        elif scale is None:
            target[:, self.rows] = x
        else:
            torch.mul(x, scale, out=target[:, self.rows])


@dataclass(frozen=True)
class Course:
    """A plan with units: what sums of each row are multiples of.

    Args:
        plan: the order of the rows.
        base: exponent of the unit of each row's sums, ``[lists, rows]``; -inf if a row sees no key.
        top: largest exponent among the keys of each row, in the plan's order.
        tops: largest exponent among leading keys, ``[lists, keys + 1]``; 0 where all are -inf.
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
        keys: the keys of all lists.
        plan: the order of the rows.

    Returns:
        the course.
    """
    exponent, limit = keys.scales.exponent, plan.limit
    tops = torch.cat([exponent.new_full((len(exponent), 1), -torch.inf), exponent.cummax(1)[0]], 1)
    top = tops[:, limit]
    sizes = [[x.rows.stop - x.rows.start, x.near.stop] for x in plan.steps]
    lengths, ends = torch.tensor(sizes, dtype=torch.int64, device=limit.device).view(-1, 2).unbind(1)
    base = tops[:, ends].repeat_interleave(lengths, 1)
    far = ((base - top > FAR_ABOVE) & (top > -torch.inf)).any(0)
    count = torch.cat([lengths.new_zeros(1), far.cumsum(0)])
    edge = lengths.cumsum(0)
    apart = count[edge] > count[edge - lengths]
    base = torch.where(apart.repeat_interleave(lengths), top, base).masked_fill(top == -torch.inf, -torch.inf)
    if plan.order is not None:
        base = torch.empty_like(base).index_copy_(1, plan.order, base)
    pieces = [(x, flag) for step, flag in zip(plan.steps, apart.tolist(), strict=True) for x in step.pieces(flag)]
    steps, flags = [x for x, _ in pieces], [flag for _, flag in pieces]
    tops = finite(tops)
    at = torch.tensor([0, *(_unit_at(*x) for x in pieces)], dtype=torch.int64, device=limit.device)
    moved = (tops[:, at].diff(dim=1) != 0).any(0).tolist()
    return Course(plan, base, top, tops, steps, flags, moved)


def _unit_at(step: Step, apart: bool) -> int:
    """Return the number of leading keys whose largest scale is the unit of a step's state."""
    return step.near.start if apart else step.near.stop


def blocks(keys: Keys, course: Course, power: Power) -> Iterator[Block]:
    """Walk over rows in the order of their limits, over as many lists at a time as a step has room for.

    Args:
        keys: the keys of all lists.
        course: the order of the rows, and their units.
        power: of products of features.

    Yields:
        blocks, each row of each list in one of them.
    """
    several = max(1, course.plan.step_rows // max(1, len(course.plan.limit)))
    for first in range(0, len(keys.key), several):
        yield from _walk(keys, slice(first, first + several), course, power)


def _walk(keys: Keys, lists: slice, course: Course, power: Power) -> Iterator[Block]:
    tops, end = course.tops[lists], 0
    base = tops[:, :1]
    state = tops.new_zeros(len(tops), power.expanded(keys.key.shape[2]), keys.value.shape[2] + 1)
    for number, (step, apart, moved) in enumerate(zip(course.steps, course.apart, course.moved, strict=True), 1):
        before, base = base, tops[:, _unit_at(step, apart), None]
        if moved:
            # it grows, but from the 0 that stands for no keys
            state = state * (before - base).clamp(max=0).exp2()[..., None]
        while end < step.near.start:
            some = keys.of(lists, slice(end, min(end + course.plan.step_rows, step.near.start)))
            end += some.key.shape[1]
            state.baddbmm_(power.expand(some.key.to(state.dtype)), some.scaled(some.scales.times(-base)))
        near = keys.of(lists, step.near)
        if apart:
            yield _apart(step, near, (lists, course), (state, base))
            continue
        key, value = (_by_block(x, step.blocks) for x in (near.key.to(state.dtype), near.scaled(near.scales.times(-base))))
        # nothing reads the state behind the last block
        added = step.blocks - (number == len(course.steps))
        states = _running(state, key, value, added, power)
        state, end = states[added], end + added * key.shape[1]
        weight = None if step.stairs else _shown(course.plan, step).to(state.dtype).repeat(len(tops), 1, 1)
        states = states[: step.blocks].transpose(0, 1).flatten(0, 1)
        yield _block(step, (lists, course), (states, None), (key, value, weight))


def _apart(step: Step, near: Keys, place: tuple[slice, Course], state: tuple[Tensor, Tensor]) -> Block:
    """Weigh the near keys of one block whose rows each have a base, lest the largest scale of a later key drowns them."""
    own = finite(place[1].top[place[0], step.rows])
    raised = near.scales.exponent[:, None] - own[..., None]
    weight = raised.masked_fill(~_shown(place[1].plan, step), -torch.inf).exp2()
    near_keys = near.key.to(weight.dtype), near.scaled(near.scales.factor), weight
    return _block(step, place, (state[0], (state[1] - own).clamp(max=0).exp2()[..., None]), near_keys)


def _block(
    step: Step,
    place: tuple[slice, Course],
    states: tuple[Tensor, Tensor | None],
    near: tuple[Tensor, Tensor, Tensor | None],
) -> Block:
    lists, order = place[0], place[1].plan.order
    rows = step.rows if order is None else order[step.rows]
    return Block(lists, rows, (step.rows.stop - step.rows.start) // step.blocks, *states, *near)


def _shown(plan: Plan, step: Step) -> Tensor:
    """Mark the near keys that each row sees, ``[blocks, rows, near]``."""
    rows, keys = ((x.stop - x.start) // step.blocks for x in (step.rows, step.near))
    limit = plan.limit[step.rows].view(step.blocks, rows, 1) - step.near.start
    key = torch.arange(keys * step.blocks, dtype=torch.int64, device=limit.device).view(step.blocks, 1, keys)
    return key < limit


def _by_block(x: Tensor, count: int) -> Tensor:
    """Split an axis of keys: ``[lists, keys, ...]`` to ``[lists * blocks, keys of one, ...]``."""
    return x.reshape(len(x) * count, x.shape[1] // count, x.shape[2])


def _running(state: Tensor, key: Tensor, value: Tensor, added: int, power: Power) -> Tensor:
    """Return the states before each block of keys, and behind the last of `added` ones, ``[added + 1, lists, ...]``."""
    lists = len(state)
    result = state.new_empty(added + 1, *state.shape)
    result[0] = state
    if added:
        some, values = (x.unflatten(0, (lists, -1))[:, :added].transpose(0, 1).flatten(0, 1) for x in (key, value))
        torch.bmm(power.expand(some), values, out=result[1:].flatten(0, 1))
        before, *others = result.unbind(0)
        for state in others:
            before = state.add_(before)
    return result


def product_of(block: Block, query: Tensor) -> Tensor:
    """Multiply rows by their near keys, ``[.., rows, near]``."""
    return query @ block.key.transpose(1, 2)


def _hide(weight: Tensor, block: Block) -> Tensor:
    """Multiply pairs by their weight, in place."""
    return weight.tril_() if block.weight is None else weight.mul_(block.weight)


def read(block: Block, query: Tensor, product: Tensor, power: Power) -> Tensor:
    """Sum the values of the keys that each row sees.

    total_i = sum_{j < limit_i} 2^-base_i exp(log scale_j) (query_i . key_j)^power value_j

    Args:
        block: the rows.
        query: their features, ``[.., rows, features]``.
        product: `product_of` them; lost.
        power: of products of features.

    Returns:
        the sums, ``[.., rows, width]``.
    """
    total = power.read(query, block.state)
    if block.decay is not None:
        total = total * block.decay
    return total.baddbmm_(_hide(power.weigh(product), block), block.value)


def pull(block: Block, query: Tensor, slope: Tensor, product: Tensor, power: Power) -> Tensor:
    """Differentiate slope . `read` by the query.

    Args:
        block: the rows.
        query: their features.
        slope: of a loss in their sums, ``[.., rows, width]``.
        product: `product_of` them.
        power: of products of features.

    Returns:
        the gradient, ``[.., rows, features]``.
    """
    total = power.pull(query, block.state, slope)
    if block.decay is not None:
        total = total * block.decay
    weight = _hide(power.slope(product, slope @ block.value.transpose(1, 2)), block)
    return total.baddbmm_(weight, block.key)
