"""The order in which rows are read: blocks of similar limits, and steps of equal blocks for one batch of products."""

from dataclasses import dataclass

import torch
from torch import Tensor

# keys between the state and a row's limit, weighted pair by pair; twice as many if states are large, so that fewer are made
BLOCK_KEYS = 64
# expanded features of a large state
LARGE = 256
# rows read, or keys added, at once: their pairs take 512 KiB in float32. The more at once, the fewer calls of torch; the
# fewer at once, the more stays in the cache of a core
STEP_ROWS = 2048
# numbers of expanded features at once, which bounds rows as well: 2.5 MiB in float32. A single block may have more
STEP_NUMBERS = 5 << 17


def block_keys(expanded: int) -> int:
    """Return the keys of a block.

    Args:
        expanded: number of expanded features.

    Returns:
        the number.
    """
    return BLOCK_KEYS if expanded <= LARGE else 2 * BLOCK_KEYS


@dataclass(frozen=True)
class Step:
    """Consecutive blocks of rows, as many in each, that see as many keys beyond the block before.

    Args:
        blocks: number of blocks.
        rows: all of their rows, in the order of the plan.
        near: all keys that are weighted pair by pair; each block has its share, and its rows see all keys before that.
        stairs: whether row i of each block sees i + 1 near keys.
    """

    blocks: int
    rows: slice
    near: slice
    stairs: bool

    def pieces(self, apart: bool) -> "list[Step]":
        """Split into steps of one block, if wanted."""
        if not apart:
            return [self]
        rows, keys = ((x.stop - x.start) // self.blocks for x in (self.rows, self.near))
        return [
            Step(
                1,
                slice(self.rows.start + i * rows, self.rows.start + (i + 1) * rows),
                slice(self.near.start + i * keys, self.near.start + (i + 1) * keys),
                self.stairs,
            )
            for i in range(self.blocks)
        ]


@dataclass(frozen=True)
class Plan:
    """Rows in the order of their limits, cut into steps.

    Args:
        order: numbers of the rows; None if they are in order already.
        limit: of each row, ascending.
        steps: the steps.
        step_rows: rows and keys at once.
        mirrored: whether rows and keys are counted from their ends.
    """

    order: Tensor | None
    limit: Tensor
    steps: list[Step]
    step_rows: int
    mirrored: bool = False

    def place(self, part: slice, total: int) -> slice:
        """Return where rows or keys of the plan lie in memory, if there are `total`."""
        return slice(total - part.stop, total - part.start) if self.mirrored else part


def plan_of(limit: Tensor, expanded: int, *, mirrored: bool = False) -> Plan:
    """Order rows by limit, and cut them.

    Args:
        limit: number of leading keys each row sees; ascending if `mirrored`.
        expanded: number of expanded features.
        mirrored: whether rows and keys are counted from their ends: the first limit is that of the last row, and counts
            keys from the last one on.

    Returns:
        the plan.
    """
    size = block_keys(expanded)
    step_rows = max(1, min(STEP_ROWS, max(size, STEP_NUMBERS // max(1, expanded))))
    order, least, most = None, 1, 1
    if len(limit) > 1:
        least, most = torch.stack((limit[1:] - limit[:-1]).aminmax()).tolist()
    if least < 0:
        limit, order = limit.sort(stable=True)
    first = int(limit[0]) if len(limit) else 0
    if least == most == 1 and first > 0 and size <= step_rows:
        blocks = _even_blocks(first, len(limit), size)
    else:
        blocks = _blocks(limit, size, step_rows)
    return Plan(order, limit, _joined(blocks, step_rows), step_rows, mirrored)


def _even_blocks(first: int, rows: int, size: int) -> list[list[int]]:
    """Cut rows into the blocks of `_blocks` if each row sees one key more than the row before; the first sees `first`."""
    blocks, row = [], 0
    while row < rows:
        start = (first + row - 1) // size * size
        last = min(rows, start + size + 1 - first)
        low, high = first + row, first + last - 1
        near = start if low < high else low
        blocks.append([row, last, near, high, int(near < low == start + 1)])
        row = last
    return blocks


def _blocks(limit: Tensor, size: int, step_rows: int) -> list[list[int]]:
    """Cut rows into blocks: first row, the row after the last, first near key, the key after the last, and `Step.stairs`."""
    number = torch.arange(len(limit), dtype=torch.int64, device=limit.device)
    # a division of floating numbers, exact for integers below 2^53, takes a tenth of the time of one of integers
    place = (limit - 1).clamp(min=0).double().div(size).floor().long()
    other = torch.ones_like(place, dtype=torch.bool)
    other[1:] = place[1:] != place[:-1]
    within = number - torch.where(other, number, 0).cummax(0)[0] if len(limit) else number
    cut = within == 0
    if bool((within >= step_rows).any()):
        cut = within % step_rows == 0
    edges = torch.cat([number[cut], number.new_tensor([len(limit)])])
    firsts, lasts = edges[:-1], edges[1:]
    low, high = limit[firsts], limit[lasts - 1]
    # from the place's first key on, unless the state can go farther or is farther already
    first = (within[firsts] == 0) & (low < high)
    start = torch.where(first, place[firsts] * size, low)
    missing = (limit - place * size != within + 1).cumsum(0)
    missing = torch.cat([missing.new_zeros(1), missing])
    stairs = first & (missing[lasts] == missing[firsts])
    return torch.stack([firsts, lasts, start, high, stairs.long()], 1).tolist()


def _joined(blocks: list[list[int]], step_rows: int) -> list[Step]:
    """Join blocks, as `_blocks` returns them, to steps of equal blocks that are not too long."""
    steps: list[Step] = []
    number = 0
    while number < len(blocks):
        first, last, start, end, stairs = blocks[number]
        rows, keys, count, number = last - first, end - start, 1, number + 1
        while keys and blocks[number : number + 1] == [[last, last + rows, end, end + keys, stairs]]:
            if last + rows - first > step_rows:
                break
            last, end, count, number = last + rows, end + keys, count + 1, number + 1
        steps.append(Step(count, slice(first, last), slice(start, end), bool(stairs)))
    return steps
