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
        candidates: keys that lists score where a tile sees more than `most`; 0 scores larger blocks there.
        coarse: averages, for each list, that score all keys to find them.
        averages: the same at most in a tile that sees `most` keys; half of that where it sees twice as many, and so on.
        parts: parts of the heads of a group, whose lists are sorted apart.
        seams: the first tiles that see more than `most` blocks of `first` keys, twice as many, and so on.
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
    candidates: int
    coarse: int
    averages: int
    parts: int
    seams: tuple[int, ...]

    @property
    def levels(self) -> int:
        """Doublings of the keys that tiles see, with none."""
        return 1 + len(self.seams)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Keys in the first blocks, how many sizes there are, and blocks of each: of one key where there are candidates."""
        if self.candidates:
            return 1, 1, self.keys
        return self.first, self.levels, min(self.most, -(-self.keys // self.first))

    def lists(self, width: int) -> int:
        """Count the lists of a program, whose averages are `width` wide: their scores fill its registers."""
        padded = 1 << (self.groups - 1).bit_length()
        # queries, and keys that are on their way, share the memory of a multiprocessor
        return max(8, min(_MOST_LISTS, _AVERAGES // padded) // max(1, width // 128))

    def span(self, lists: int) -> int:
        """Count the lists that a program takes at once, no more than `lists`, so that their blocks have one size."""
        if self.candidates:
            return lists
        return max(each for each in range(1, lists + 1) if all(seam * self.many % each == 0 for seam in self.seams))

    def together(self, rows: int) -> int:
        """Count the rows of keys, out of `rows`, whose lists programs take in turn."""
        return max(each for each in range(1, _MOST_ROWS + 1) if rows % each == 0)

    def units(self, rows: int, tiles: int, width: int) -> int:
        """Count how often programs take lists, of `tiles` tiles on each of `rows` rows of keys."""
        plain, lists = self.plain(tiles), self.lists(width)
        return rows * (-(-plain * self.many // self.span(lists)) + (tiles - plain) * self.many // self.own(width))

    def plain(self, tiles: int) -> int:
        """Count the tiles, out of `tiles`, that have no candidates."""
        if not self.candidates:
            return tiles
        return 0 if self.first > 1 else min((tiles, *self.seams))

    def own(self, width: int) -> int:
        """Count the lists of a tile that share candidates: all that a program has room for, equally many, of one part."""
        return max(each for each in range(1, self.lists(width) + 1) if self.many // self.parts % each == 0)

    def coarse_averages(self, width: int) -> int:
        """Count the places for averages that find candidates, padded: whole lists of them; 0 where there are none."""
        if not self.candidates:
            return 0
        own = self.own(width)
        most = max(1, min(self.coarse * own, self.averages * own // 2, self.groups * own))
        return max(16, self.lists(width), 1 << (most - 1).bit_length())

    def room(self, width: int, tiles: int) -> int:
        """Count the places for shares that a list of a program has, out of `tiles` tiles."""
        _, _, blocks = self.sizes
        if self.candidates:
            plain = min(self.most, self.keys) if self.plain(tiles) else 0
            # all lists of a program together have places for the shares of all keys
            blocks = max(plain, min(self.candidates, self.keys) + 1, -(-self.keys // self.lists(width)))
        return -(-blocks // _ALIGNED) * _ALIGNED


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
        the numbers of candidates, ``[programs, candidates]``, int32. Averages that find candidates stand behind those of
        lists, as if of more lists.
    """
    width = like.shape[3]
    lists, room, units = plan.lists(width), plan.room(width, tiles), plan.units(rows, tiles, width)
    # at least one for each multiprocessor: where rows of shares are longest, at half a million keys or more
    fit = max(_multiprocessors(like.device), _BYTES // (lists * room * dtype.itemsize))
    programs = min(units, _PROGRAMS * _multiprocessors(like.device), fit)
    held = lists + -(-plan.coarse_averages(width) // plan.groups)
    query, spread = (like.new_empty((programs, held, *each), dtype=dtype) for each in ((plan.groups, width), (2 * width,)))
    log_rows, bar = (like.new_empty((programs, held, plan.groups), dtype=torch.float32) for _ in range(2))
    share = like.new_empty((programs, lists, room), dtype=dtype)
    numbers = like.new_empty((programs, min(plan.candidates, plan.keys)), dtype=torch.int32)
    return query, spread, log_rows, bar, share, numbers


def _multiprocessors(device: torch.device) -> int:
    """Count the multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _MULTIPROCESSORS
