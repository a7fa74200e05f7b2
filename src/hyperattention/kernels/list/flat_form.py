"""Which selections the fast list kernel reads, and how each becomes two ranges of keys and one flat list a tile.

The loops of the fast kernel (`triton_flat`) know no groups. A tile reads a *range* first, keys that follow one another and
need no list, and then one flat list: every other key with its log-weight. `triton_flatten` writes both from a selection,
unless it has no more than one group beside ranges, which is such a list already.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from hyperattention.kernels.list.reference import Lists

Field = TypeVar("Field")

# slots in a block of the fast kernel; flat lists are padded to whole blocks
BLOCK = 64
# keys in a run from which it is read as a range: shorter ones would leave most of a block empty
_SHORTEST_RANGE = 64
_MOST_RANGES = 2
# slots of a flat list, which takes 8 bytes a slot and tile of memory
_MOST_SLOTS = 4096


@dataclass(frozen=True)
class FlatLists:
    """A selection laid out for the fast kernel; log-weights are in base 2.

    Args:
        header: eight numbers a tile, ``[tiles, 8]``, int32: first key of the first range; its length; first key of the
            second range; length of both; place in both from which blocks need more than the first range's log-weight; place
            in both from which pairs are tested against the row's limit; length of the flat list; how many of its first keys
            are tested.
        range_weight: log-weight of the keys of each range, ``[tiles, 2]``, float32.
        index: the flat lists, ``[tiles, slots]``, int32; up to a whole block, slots that are empty repeat a listed key.
        log_weight: their log-weights, ``[tiles, slots]``, float32; -inf in empty slots.
    """

    header: Tensor
    range_weight: Tensor
    index: Tensor
    log_weight: Tensor


@dataclass(frozen=True)
class FlatForm:
    """How a selection is read as ranges and flat lists.

    Args:
        lists: the selection, its groups in the order in which they are read: ranges, then groups whose pairs are tested.
        num_ranges: leading groups that are ranges.
    """

    lists: Lists
    num_ranges: int

    @property
    def to_lay_out(self) -> bool:
        """Whether flat lists are written first: for several groups beside ranges, and for a long one that is tested.

        A flat list tells which of its keys every row sees; a group as it lies is tested throughout.
        """
        tested, slots = self.lists.causal[self.num_ranges :], _listed(self.lists, self.num_ranges)
        return len(tested) > 1 or (any(tested) and slots > BLOCK)

    @property
    def capacity(self) -> int:
        """Slots of a flat list, in whole blocks."""
        return max(BLOCK, -(-_listed(self.lists, self.num_ranges) // BLOCK) * BLOCK)


def flat_form_of(lists: Lists, num_keys: int, *, paged: bool) -> FlatForm | None:
    """Lay a selection out for the fast kernel, if that kernel reads it.

    It does not read labels (of a hash), gaps, keys in pages, keys whose numbers do not fit int32, and more than 4,096 slots
    beside two ranges, unless they are read as they lie.

    Args:
        lists: the selection.
        num_keys: keys in a row.
        paged: whether keys lie in pages.

    Returns:
        the layout; None for what the general kernel has to read. The values of tensors are never looked at.
    """
    if paged or lists.row_label is not None or lists.gap_low is not None or num_keys >= 2**31:
        return None
    slots = [first.shape[-1] * size for first, size in zip(lists.first, lists.size, strict=True)]
    whole = [
        group
        for group, (first, hole) in enumerate(zip(lists.first, lists.hole, strict=True))
        if first.shape[-1] == 1 and lists.size[group] >= _SHORTEST_RANGE and not hole.numel()
    ]
    longest = sorted(whole, key=lambda group: -lists.size[group])[:_MOST_RANGES]
    ranges = sorted(longest, key=lambda group: (lists.causal[group], group))
    listed = sorted((group for group in range(len(slots)) if group not in ranges), key=lambda g: (not lists.causal[g], g))
    form = FlatForm(_reordered(lists, [*ranges, *listed]), len(ranges))
    return None if form.to_lay_out and _listed(form.lists, form.num_ranges) > _MOST_SLOTS else form


def _listed(lists: Lists, num_ranges: int) -> int:
    """Count the slots of the groups that are no ranges."""
    groups = zip(lists.first[num_ranges:], lists.size[num_ranges:], strict=True)
    return sum(first.shape[-1] * size for first, size in groups)


def _reordered(lists: Lists, order: Sequence[int]) -> Lists:
    def picked(field: list[Field]) -> list[Field]:
        return [field[group] for group in order]

    return replace(
        lists,
        first=picked(lists.first),
        size=picked(lists.size),
        log_weight=picked(lists.log_weight),
        low=picked(lists.low),
        high=picked(lists.high),
        hole=picked(lists.hole),
        causal=picked(lists.causal),
        labelled=picked(lists.labelled),
    )
