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
        first: keys in a block for the first tile.
        many: lists of a tile.
        groups: averages of a list.
        normal: blocks of a stretch.
        steps: times that groups are formed anew around their means.
        rounds: rounds of cutting listings to one a key.
        seams: the first tiles that have larger blocks, once for each doubling.
    """

    size: int
    first_tile: int
    length: int
    step: int
    keys: int
    most: int
    first: int
    many: int
    groups: int
    normal: int
    steps: int
    rounds: int
    seams: tuple[int, ...]

    @property
    def levels(self) -> int:
        """Sizes of blocks."""
        return 1 + len(self.seams)

    @property
    def blocks(self) -> int:
        """Blocks of each size, at most."""
        return min(self.most, -(-self.keys // self.first))

    def lists(self, width: int) -> int:
        """Count the lists of a program, whose averages are `width` wide: their scores fill its registers."""
        padded = 1 << (self.groups - 1).bit_length()
        # queries, and keys that are on their way, share the memory of a multiprocessor
        return max(8, min(_MOST_LISTS, _AVERAGES // padded) // max(1, width // 128))

    def span(self, lists: int) -> int:
        """Count the lists that a program takes at once, no more than `lists`, so that their blocks have one size."""
        return max(each for each in range(1, lists + 1) if all(seam * self.many % each == 0 for seam in self.seams))

    def together(self, rows: int) -> int:
        """Count the rows of keys, out of `rows`, whose lists programs take in turn."""
        return max(each for each in range(1, _MOST_ROWS + 1) if rows % each == 0)

    def units(self, rows: int, tiles: int, width: int) -> int:
        """Count how often programs take lists, of `tiles` tiles on each of `rows` rows of keys."""
        return rows * -(-tiles * self.many // self.span(self.lists(width)))


def memory_of(
    plan: AlikePlan, like: Tensor, units: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ask for the memory of all programs.

    Args:
        plan: what is chosen.
        like: queries.
        units: times that a program takes some lists, over all programs.
        dtype: dtype of averages and shares.

    Returns:
        for each program, memory for averages, ``[programs, lists, groups, width]``; for what they leave out beside half of
        their squares, ``[programs, lists, 2 * width]``; for half the logarithm of the queries in each, and for what their
        scores are compared with, ``[programs, lists, groups]``, float32; and for shares, ``[programs, lists, room]``.
    """
    lists, width, room = plan.lists(like.shape[3]), like.shape[3], -(-plan.blocks // _ALIGNED) * _ALIGNED
    programs = min(units, _PROGRAMS * _multiprocessors(like.device), max(1, _BYTES // (lists * room * dtype.itemsize)))
    query, spread, share = (
        like.new_empty((programs, lists, *each), dtype=dtype) for each in ((plan.groups, width), (2 * width,), (room,))
    )
    log_rows, bar = (like.new_empty((programs, lists, plan.groups), dtype=torch.float32) for _ in range(2))
    return query, spread, log_rows, bar, share


def _multiprocessors(device: torch.device) -> int:
    """Count the multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _MULTIPROCESSORS
