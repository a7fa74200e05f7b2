"""Weighted sums over the leading keys of each row: a state for the keys that a block of rows shares, pairs for the rest.

Rows are processed in the order of their limits, some blocks at a time: keys before a block are in its state, and the few
keys between the limits of its rows are weighted pair by pair. Rows are held upright, features by rows, and pairs as near
keys by rows: a product whose second factor is transposed takes twice as long as one whose first factor is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.kernels.feature.columns import Columns
from hyperattention.kernels.feature.course import Course, unit_at
from hyperattention.kernels.feature.keys import Keys
from hyperattention.kernels.feature.plan import Plan, Step
from hyperattention.kernels.feature.powers import Power
from hyperattention.kernels.feature.scales import finite


@dataclass(frozen=True)
class Block:
    """The rows of a step, and all they need; blocks of all lists are one axis, ``lists * blocks``.

    Args:
        lists: the lists.
        rows: numbers of the rows: a slice, or an index.
        blocks: blocks of rows.
        state: sum over the keys before the block of 2^-base exp(log scale) expanded key value^T, ``[.., expanded, width]``.
        decay: 2^(base of the state - base of each row), ``[.., rows, 1]``; None for 1.
        key: the scaled near keys, ``[.., near, features]``; no keys if rows see none beyond the state.
        value: their values, ``[.., near, width]``.
        weight: what each pair's weight is multiplied by, 0 if hidden; ``[.., near, rows]``, or one block for all.
    """

    lists: slice
    rows: slice | Tensor
    blocks: int
    state: Tensor
    decay: Tensor | None
    key: Tensor
    value: Tensor
    weight: Tensor

    def take(self, x: Columns, padded: int) -> Tensor:
        """Select the rows, block by block, in the dtype of sums, upright: ``[.., padded, rows]``."""
        x = x[self.lists]
        x = x[:, self.rows] if isinstance(self.rows, slice) else x.ordered(self.rows)
        return x.upright(self.blocks, padded, self.state.dtype)

    def part(self, x: Tensor) -> Tensor:
        """Select a number of each row of ``[lists, rows]``, ``[.., rows, 1]``."""
        x = x[self.lists]
        x = x[:, self.rows] if isinstance(self.rows, slice) else x.index_select(1, self.rows)
        return x.reshape(len(self.state), -1, 1)

    def put(self, x: Tensor, scale: Tensor, target: Tensor, operation: Callable[..., Tensor] = torch.mul) -> None:
        """Write rows ``[.., rows, width]`` times the scale of each to their places in ``[lists, rows, width]``.

        Args:
            x: the rows of the blocks.
            scale: of each, ``[.., rows, 1]``.
            target: all rows of all lists.
            operation: `torch.div` divides by the scale.
        """
        target = target[self.lists]
        if isinstance(self.rows, slice):
            place = target[:, self.rows].unflatten(1, (self.blocks, -1))
            operation(*(each.unflatten(0, (len(target), -1)) for each in (x, scale)), out=place)
        else:
            target.index_copy_(1, self.rows, operation(x, scale).reshape(len(target), -1, x.shape[2]).to(target.dtype))

    def note(self, x: Tensor, target: Tensor) -> None:
        """Write a number of each row, ``[.., rows, 1]``, to their places in ``[lists, rows]``."""
        target = target[self.lists]
        target[:, self.rows] = x.reshape(len(target), -1)


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
    alike = keys.alike
    for first in range(0, len(keys.key), several):
        yield from _walk(keys, slice(first, first + several), course, power, alike)


def _walk(keys: Keys, lists: slice, course: Course, power: Power, alike: bool) -> Iterator[Block]:
    tops, end = course.tops[lists], 0
    base = tops[:, :1]
    state = tops.new_zeros(len(tops), power.expanded(keys.key.shape[2]), keys.value.padded)
    for number, (step, apart, moved) in enumerate(zip(course.steps, course.apart, course.moved, strict=True), 1):
        before, base = base, tops[:, unit_at(step, apart), None]
        if moved:
            # it grows, but from the 0 that stands for no keys
            state = state * (before - base).clamp(max=0).exp2()[..., None]
        while end < step.near.start:
            some = keys.of(lists, slice(end, min(end + course.plan.step_rows, step.near.start)))
            end += some.key.shape[1]
            key = power.keys(some.scaled(base / power.degree, alike))
            state.baddbmm_(power.expand(key), some.value.together(state.dtype))
        near = keys.of(lists, step.near)
        value = near.value.together(state.dtype)
        if apart:
            yield _apart(step, (near, power, value), (lists, course), (state, base))
            continue
        key = power.keys(_by_block(near.scaled(base / power.degree, alike), step.blocks))
        value = _by_block(value, step.blocks)
        # nothing reads the state behind the last block
        added = step.blocks - (number == len(course.steps))
        states = _running(state, key, value, added, power)
        state, end = states[added], end + added * key.shape[1]
        weight = _weights(course.plan, step, state)
        states = states[: step.blocks].transpose(0, 1).flatten(0, 1)
        yield _block(step, (lists, course), (states, None), (key, value, weight))


def _apart(step: Step, near: tuple[Keys, Power, Tensor], place: tuple[slice, Course], state: tuple[Tensor, Tensor]) -> Block:
    """Weigh the near keys of one block whose rows each have a base, lest the largest scale of a later key drowns them."""
    keys, power, value = near
    own = finite(place[1].top[place[0], step.rows])
    raised = power.degree * keys.scales.exponent[..., None] - own[:, None]
    weight = raised.masked_fill(~_shown(place[1].plan, step), -torch.inf).exp2()
    near_keys = power.keys(keys.key * keys.scales.factor[..., None]), value, weight
    return _block(step, place, (state[0], (state[1] - own).clamp(max=0).exp2()[..., None]), near_keys)


def _block(
    step: Step,
    place: tuple[slice, Course],
    states: tuple[Tensor, Tensor | None],
    near: tuple[Tensor, Tensor, Tensor],
) -> Block:
    lists, order = place[0], place[1].plan.order
    rows = step.rows if order is None else order[step.rows]
    return Block(lists, rows, step.blocks, *states, *near)


def _shown(plan: Plan, step: Step) -> Tensor:
    """Mark the near keys that each row sees, ``[blocks, near, rows]``."""
    rows, keys = ((x.stop - x.start) // step.blocks for x in (step.rows, step.near))
    limit = plan.limit[step.rows].view(step.blocks, 1, rows) - step.near.start
    key = torch.arange(keys * step.blocks, dtype=torch.int64, device=limit.device).view(step.blocks, keys, 1)
    return key < limit


def _weights(plan: Plan, step: Step, state: Tensor) -> Tensor:
    """Return 1 for the near keys that each row sees and 0 for others, ``[lists * blocks or 1, near, rows]``."""
    if step.stairs:
        # `triu_` of all pairs takes five times as long as their product with this
        size = (step.rows.stop - step.rows.start) // step.blocks
        return state.new_ones(1, size, size).triu_()
    return _shown(plan, step).to(state.dtype).repeat(len(state), 1, 1)


def _by_block(x: Tensor, count: int) -> Tensor:
    """Split an axis of keys: ``[lists, keys, ...]`` to ``[lists * blocks, keys of one, ...]``."""
    return x.reshape(len(x) * count, x.shape[1] // count, x.shape[2])


def _running(state: Tensor, key: Tensor, value: Tensor, added: int, power: Power) -> Tensor:
    """Return the states before each block of keys, and behind the last of `added` ones, ``[added + 1, lists, ...]``."""
    lists = len(state)
    result = state.new_empty(added + 1, *state.shape)
    result[0] = state
    if added:
        expanded = power.expand(key)
        if lists > 1:
            expanded, value = (x.unflatten(0, (lists, -1)).transpose(0, 1) for x in (expanded, value))
            expanded, value = expanded[:added].flatten(0, 1), value[:added].flatten(0, 1)
        torch.bmm(expanded[: added * lists], value[: added * lists], out=result[1:].flatten(0, 1))
        before, *others = result.unbind(0)
        for state in others:
            before = state.add_(before)
    return result


def product_of(block: Block, query: Tensor) -> Tensor:
    """Multiply near keys by upright rows, ``[.., near, rows]``."""
    return torch.bmm(block.key, query)


def hide(weight: Tensor, block: Block) -> Tensor:
    """Multiply pairs by their weight, in place."""
    return weight.mul_(block.weight)


def read(block: Block, query: Tensor, product: Tensor, power: Power) -> Tensor:
    """Sum the values of the keys that each row sees.

    total_i = sum_{j < limit_i} 2^-base_i exp(log scale_j) (query_i . key_j)^power value_j

    Args:
        block: the rows.
        query: their features, upright, ``[.., features, rows]``.
        product: `product_of` them; lost.
        power: of products of features.

    Returns:
        the sums, ``[.., rows, width]``.
    """
    total = power.read(query, block.state)
    if block.decay is not None:
        total = total * block.decay
    return total.baddbmm_(hide(power.weigh(product), block).transpose(1, 2), block.value)


def pull(block: Block, query: Tensor, slope: Tensor, product: Tensor | None, power: Power) -> Tensor:
    """Differentiate slope . `read` by the query.

    Args:
        block: the rows.
        query: their features, upright.
        slope: of a loss in their sums, upright, ``[.., width, rows]``.
        product: `product_of` them; the first power needs none.
        power: of products of features.

    Returns:
        the gradient, upright.
    """
    total = power.pull(query, block.state, slope)
    if block.decay is not None:
        total = total * block.decay.transpose(1, 2)
    weight = hide(power.slope(product, torch.bmm(block.value, slope)), block)
    return total.baddbmm_(block.key.transpose(1, 2), weight)
