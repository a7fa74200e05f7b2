"""Weighted sums over the leading keys of each row: a state for the keys that a block of rows shares, pairs for the rest.

Rows are processed in the order of their limits, some blocks at a time: keys before a block are in its state, and the few
keys between the limits of its rows are weighted pair by pair. Rows are held upright, features by rows, and pairs as near
keys by rows: a product whose second factor is transposed takes twice as long as one whose first factor is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.kernels.feature.columns import Columns, by_block
from hyperattention.kernels.feature.course import Course, unit_at
from hyperattention.kernels.feature.keys import Keys
from hyperattention.kernels.feature.plan import Plan, Step
from hyperattention.kernels.feature.powers import Power
from hyperattention.kernels.feature.scales import finite
from hyperattention.kernels.feature.workspace import Workspace


@dataclass(frozen=True)
class Block:
    """The rows of a step, and all they need; blocks of all lists are one axis, ``blocks * lists``.

    Args:
        lists: the lists.
        rows: numbers of the rows: a slice, or an index.
        blocks: blocks of rows.
        state: sum over the keys before the block of 2^-base exp(log scale) expanded key value^T, ``[.., expanded, width]``.
        decay: 2^(base of the state - base of each row), ``[.., rows, 1]``; None for 1.
        key: the near keys, ``[.., near, features]``; no keys if rows see none beyond the state.
        value: their scaled values, ``[.., near, width]``.
        weight: what each pair's weight is multiplied by, 0 if hidden; ``[.., near, rows]``, or one block for all.
        work: memory.
        lying: whether rows are used as they lie: there are no near keys, and one product of features and state is all.
    """

    lists: slice
    rows: slice | Tensor
    blocks: int
    state: Tensor
    decay: Tensor | None
    key: Tensor
    value: Tensor
    weight: Tensor
    work: Workspace
    lying: bool

    def take(self, x: Columns, padded: int, name: str) -> Tensor:
        """Select the rows, block by block, in the dtype of sums, upright: ``[.., padded, rows]``."""
        x = x[self.lists, self.rows] if isinstance(self.rows, slice) else x[self.lists].ordered(self.rows)
        return x.lying(name, self.work).transpose(1, 2) if self.lying else x.upright(self.blocks, padded, name, self.work)

    def part(self, x: Tensor) -> Tensor:
        """Select a number of each row of ``[lists, rows]``, ``[.., rows, 1]``."""
        x = x[self.lists, self.rows]
        return by_block(x.unsqueeze(2), self.blocks).reshape(self.blocks * x.shape[0], -1, 1)

    def put(self, x: Tensor, scale: Tensor, target: Tensor, operation: Callable[..., Tensor] = torch.mul) -> None:
        """Write rows ``[.., rows, width]`` times the scale of each to their places in ``[lists, rows, width]``.

        Args:
            x: the rows of the blocks.
            scale: of each, ``[.., rows, 1]``.
            target: all rows of all lists.
            operation: `torch.div` divides by the scale.
        """
        if isinstance(self.rows, slice):
            place = by_block(target[self.lists, self.rows], self.blocks)
            operation(x.view(*place.shape), scale.view(*place.shape[:3], 1), out=place)
            return
        target, rows = target[self.lists], operation(x, scale).unflatten(0, (self.blocks, -1)).transpose(0, 1)
        target.index_copy_(1, self.rows, rows.flatten(1, 2).to(target.dtype))

    def note(self, x: Tensor, target: Tensor) -> None:
        """Write a number of each row, ``[.., rows, 1]``, to their places in ``[lists, rows]``."""
        target = target[self.lists]
        rows = x.unflatten(0, (self.blocks, -1)).transpose(0, 1)
        target[:, self.rows] = rows.reshape(target.shape[0], -1)


def blocks(keys: Keys, course: Course, power: Power, work: Workspace) -> Iterator[Block]:
    """Walk over rows in the order of their limits, over as many lists at a time as a step has room for.

    Args:
        keys: the keys of all lists.
        course: the order of the rows, and their units.
        power: of products of features.
        work: memory, which the next block takes again.

    Yields:
        blocks, each row of each list in one of them.
    """
    several = max(1, course.plan.step_rows // max(1, len(course.plan.limit)))
    for first in range(0, len(keys.key), several):
        yield from _walk(keys, slice(first, first + several), course, power, work)


def _walk(keys: Keys, lists: slice, course: Course, power: Power, work: Workspace) -> Iterator[Block]:
    keys, plan, tops, end = keys.of(lists, slice(None)), course.plan, course.tops[lists], 0
    (count, total, features), width = keys.key.shape, keys.value.padded
    base = tops[:, :1]
    state = work.take("carried", count, power.expanded(features), width).zero_()
    whole = slice(None)
    for number, (step, apart, moved) in enumerate(zip(course.steps, course.apart, course.moved, strict=True), 1):
        before, base = base, tops[:, unit_at(step, apart), None]
        if moved:
            # it grows, but from the 0 that stands for no keys
            state.mul_((before - base).clamp(max=0).exp2()[..., None])
        while end < step.near.start:
            until = min(end + plan.step_rows, step.near.start)
            some = keys.of(whole, plan.place(slice(end, until), total))
            end = until
            state.baddbmm_(power.expand(power.keys(some.key, 1, work), work), some.summed(base, 1, work))
        near = keys.of(whole, plan.place(step.near, total))
        if apart:
            yield _apart(step, (near, power), (lists, course), (state, base), work)
            continue
        key, value = power.keys(near.key, step.blocks, work), near.summed(base, step.blocks, work)
        states = state
        # nothing reads the state behind the last block
        if step.near.stop > step.near.start and (step.blocks > 1 or number < len(course.steps)):
            states, state = _running(state, power.expand(key, work), value, plan.mirrored, work)
            end = step.near.stop
        weight = _weights(plan, step, count, work)
        lying = power.degree == 1 and step.near.stop == step.near.start
        yield _block(step, (lists, course), (states, None), (key, value, weight), work, lying)


def _apart(
    step: Step, near: tuple[Keys, Power], place: tuple[slice, Course], state: tuple[Tensor, Tensor], work: Workspace
) -> Block:
    """Weigh the near keys of one block whose rows each have a base, lest the largest scale of a later key drowns them."""
    (keys, power), (lists, course) = near, place
    own = finite(course.top[lists, step.rows])
    own = own.flip(1) if course.plan.mirrored else own
    raised = keys.scales.exponent[..., None] - own[:, None]
    weight = raised.masked_fill(~_shown(course.plan, step), -torch.inf).exp2()
    # the exponents are in the weights
    value = keys.value.together(keys.scales.factor, 1, work)
    decay = (state[1] - own).clamp(max=0).exp2()[..., None]
    return _block(step, place, (state[0], decay), (power.keys(keys.key, 1, work), value, weight), work)


def _block(
    step: Step,
    place: tuple[slice, Course],
    states: tuple[Tensor, Tensor | None],
    near: tuple[Tensor, Tensor, Tensor],
    work: Workspace,
    lying: bool = False,
) -> Block:
    lists, plan = place[0], place[1].plan
    rows = plan.place(step.rows, plan.limit.shape[0]) if plan.order is None else plan.order[step.rows]
    return Block(lists, rows, step.blocks, *states, *near, work, lying)


def _shown(plan: Plan, step: Step) -> Tensor:
    """Mark the near keys that each row sees, ``[blocks, near, rows]``."""
    rows, keys = ((x.stop - x.start) // step.blocks for x in (step.rows, step.near))
    limit = plan.limit[step.rows].view(step.blocks, 1, rows) - step.near.start
    key = torch.arange(keys * step.blocks, dtype=torch.int64, device=limit.device).view(step.blocks, keys, 1)
    shown = key < limit
    return shown.flip((0, 1, 2)) if plan.mirrored else shown


def _weights(plan: Plan, step: Step, lists: int, work: Workspace) -> Tensor:
    """Return 1 for the near keys that each row sees and 0 for others, ``[blocks * lists or 1, near, rows]``."""
    if step.stairs:
        size = (step.rows.stop - step.rows.start) // step.blocks
        return work.stairs(size, plan.mirrored)
    return _shown(plan, step).to(work.dtype).repeat_interleave(lists, 0)


def _running(state: Tensor, expanded: Tensor, value: Tensor, mirrored: bool, work: Workspace) -> tuple[Tensor, Tensor]:
    """Return the states before each block of keys, ``[blocks * lists, ...]``, and that behind all of them."""
    lists, total = state.shape[0], value.shape[0]
    held = work.take("states", total + lists, *state.shape[1:])
    # what a block adds goes where the state behind it will be
    first, rest = (held[total:], held[:total]) if mirrored else (held[:lists], held[lists:])
    first.copy_(state)
    torch.bmm(expanded, value, out=rest)
    each = work.once(("each state", held.data_ptr(), held.shape, lists), lambda: held.split(lists))
    before, *others = each[::-1] if mirrored else each
    for each in others:
        before = each.add_(before)
    return held[lists:] if mirrored else held[:total], before


def product_of(block: Block, query: Tensor) -> Tensor:
    """Multiply near keys by upright rows, ``[.., near, rows]``."""
    product = block.work.take("product", *block.key.shape[:2], query.shape[2])
    return torch.bmm(block.key, query, out=product)


def hide(weight: Tensor, block: Block) -> Tensor:
    """Multiply pairs by their weight, in place."""
    return weight.mul_(block.weight)


def read(block: Block, query: Tensor, product: Tensor, power: Power, width: int) -> Tensor:
    """Sum the values of the keys that each row sees.

    total_i = sum_{j < limit_i} 2^-base_i exp(log scale_j) (query_i . key_j)^power value_j

    Args:
        block: the rows.
        query: their features, upright, ``[.., features, rows]``.
        product: `product_of` them; lost.
        power: of products of features.
        width: leading numbers of values.

    Returns:
        the sums, ``[.., rows, width]``.
    """
    total = block.work.take("total", len(query), query.shape[2], width)
    power.read(query, block.state[..., :width], total, block.work)
    if block.lying:
        return total
    if block.decay is not None:
        total.mul_(block.decay)
    return total.baddbmm_(hide(power.weigh(product), block).transpose(1, 2), block.value[..., :width])


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
    width, rows = slope.shape[1:]
    if block.lying:
        total = block.work.take("pulled", query.shape[0], rows, query.shape[1])
        return torch.bmm(slope.transpose(1, 2), block.state[..., :width].transpose(1, 2), out=total).transpose(1, 2)
    total = power.pull(query, block.state[..., :width], slope, block.work)
    if block.decay is not None:
        total.mul_(block.decay.transpose(1, 2))
    by = block.work.take("weight", *block.key.shape[:2], rows)
    torch.bmm(block.value[..., :width], slope, out=by)
    return total.baddbmm_(block.key.transpose(1, 2), hide(power.slope(product, by), block))
