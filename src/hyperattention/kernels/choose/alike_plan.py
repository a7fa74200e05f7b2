"""How a choice for alike queries is cut for a GPU: lists of a program, programs, and the memory that each of them has."""

from dataclasses import dataclass

import torch
from torch import Tensor

# averages that a key serves once it was read, out of how many lists at most
_AVERAGES, _MOST_LISTS = 128, 32
# rows of keys whose lists are taken in turn, so that every program has long and short lists
_MOST_ROWS = 8
# programs that a multiprocessor holds, and bytes that the shares of all programs may take: there are fewer if they take more
_PROGRAMS, _BYTES = 2, 144 * 2**20
# multiprocessors of a GPU that is not here
_MULTIPROCESSORS = 132
# a row of shares has a multiple of so many places
_ALIGNED = 64


@dataclass(frozen=True)
class AlikePlan:
    """What a choice for alike queries is made of, beside tensors.

    Args:
        size: positions in a tile.
        first_tile: number of the first tile.
        length: tiles of a span of queries.
        step: tiles from one span to the next.
        keys: keys of a head.
        most: blocks that a tile may see.
        levels: sizes of blocks, of 1, 4, 16, ... keys.
        many: lists of a tile.
        groups: averages of a list.
        steps: times that groups are formed anew around their means.
        rounds: rounds of cutting listings to one a key.
        candidates: keys that lists score at last, in opened blocks.
        wider: blocks that they score for each of these where blocks are opened more than once.
        parts: parts of the heads of a group, whose lists are sorted apart.
    """

    size: int
    first_tile: int
    length: int
    step: int
    keys: int
    most: int
    levels: int
    many: int
    groups: int
    steps: int
    rounds: int
    candidates: int
    wider: int
    parts: int

    @property
    def blocks(self) -> int:
        """Count the blocks of all sizes, whole ones alone."""
        return sum(self.keys >> 2 * level for level in range(self.levels))

    @property
    def units(self) -> int:
        """Count the keys or blocks that lists score at once, at most."""
        # four blocks in each that is opened, and up to three behind the last whole one
        opened = self.candidates if self.levels == 2 else self.wider * self.candidates
        return min(self.keys, max(self.most, 4 * (-(-opened // 4) + 1) if self.levels > 1 else 0))

    def lists(self, width: int) -> int:
        """Count the lists of a program, whose averages are `width` wide: their scores fill its registers."""
        padded = 1 << (self.groups - 1).bit_length()
        # queries, and keys that are on their way, share the memory of a multiprocessor
        return max(8, min(_MOST_LISTS, _AVERAGES // padded) // max(1, width // 128))

    def together(self, rows: int) -> int:
        """Count the rows of keys, out of `rows`, whose lists programs take in turn."""
        return max(each for each in range(1, _MOST_ROWS + 1) if rows % each == 0)

    def turns(self, rows: int, tiles: int, width: int) -> int:
        """Count how often programs take lists, of `tiles` tiles on each of `rows` rows of keys."""
        return rows * tiles * self.many // self.own(width)

    def own(self, width: int) -> int:
        """Count the lists of a tile that a program takes: all that it has room for, equally many, of one part."""
        return max(each for each in range(1, self.lists(width) + 1) if self.many // self.parts % each == 0)

    def room(self, width: int) -> int:
        """Count the places for shares that a list of a program has."""
        # keys that are scored at last, in opened blocks or all that a tile sees; or blocks for all lists together, and
        # behind their shares the numbers of those that are opened
        last = max(min(self.most, self.keys), min(self.candidates + 7, self.keys))
        return -(-max(last + 1, -(-3 * self.behind // (2 * self.lists(width)))) // _ALIGNED) * _ALIGNED

    @property
    def behind(self) -> int:
        """Count the places for shares of blocks, behind which the numbers of opened ones stand."""
        return -(-self.units // _ALIGNED) * _ALIGNED


def memory_of(
    plan: AlikePlan, like: Tensor, rows: int, tiles: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ask for the memory of all programs.

    Args:
        plan: what is chosen.
        like: queries.
        rows: rows of keys.
        tiles: tiles of each.
        dtype: dtype of averages and shares.

    Returns:
        for each program, memory for averages, ``[programs, lists, groups, width]``; for what they leave out beside half of
        their squares, ``[programs, lists, 2 * width]``; for half the logarithm of the queries in each, and for what their
        scores are compared with, ``[programs, lists, groups]``, float32; for shares, ``[programs, lists, room]``; and for
        the numbers of what is scored, ``[programs, units]``, int32.
    """
    width = like.shape[3]
    lists, room, turns = plan.lists(width), plan.room(width), plan.turns(rows, tiles, width)
    # at least one for each multiprocessor: where rows of shares are longest
    fit = max(_multiprocessors(like.device), _BYTES // (lists * room * dtype.itemsize))
    programs = min(turns, _PROGRAMS * _multiprocessors(like.device), fit)
    query, spread = (like.new_empty((programs, lists, *each), dtype=dtype) for each in ((plan.groups, width), (2 * width,)))
    log_rows, bar = (like.new_empty((programs, lists, plan.groups), dtype=torch.float32) for _ in range(2))
    share = like.new_empty((programs, lists, room), dtype=dtype)
    return query, spread, log_rows, bar, share, like.new_empty((programs, plan.units), dtype=torch.int32)


def _multiprocessors(device: torch.device) -> int:
    """Count the multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _MULTIPROCESSORS
