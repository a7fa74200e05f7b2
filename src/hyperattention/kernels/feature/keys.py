"""Keys, their scales, and what each adds to a sum."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.kernels.feature.columns import Columns
from hyperattention.kernels.feature.scales import Scales, scales_of
from hyperattention.kernels.feature.workspace import Workspace


@dataclass(frozen=True)
class Keys:
    """Keys in order, and what each adds to a sum.

    Args:
        key: features, ``[lists, keys, features]``.
        value: what is summed, times the scale.
        scales: of each key, ``[lists, keys]``.
        alike: whether all keys of a list have the same scale, a power of two: relative to it, each is 1. Then some keys
            have the scales of all.
    """

    key: Tensor
    value: Columns
    scales: Scales
    alike: bool

    @classmethod
    def of_log(cls, key: Tensor, value: Columns, log_scale: Tensor) -> "Keys":
        """Make keys of the logarithms of their scales, ``[lists, keys]`` in the dtype of sums."""
        first = log_scale[:, :1]
        if not bool((log_scale == first).all()):
            return cls(key, value, scales_of(log_scale), alike=False)
        one = scales_of(first)
        alike = bool(((one.factor == 1) & (one.exponent > -torch.inf)).all())
        return cls(key, value, Scales(one.factor.expand_as(log_scale), one.exponent.expand_as(log_scale)), alike)

    def of(self, lists: slice, keys: slice) -> "Keys":
        """Select some keys of some lists."""
        at = lists, keys
        return Keys(self.key[at], self.value[at], self.scales[lists if self.alike else at], self.alike)

    def ordered(self, order: Tensor) -> "Keys":
        """Put the keys of all lists into another order."""
        factor, exponent = (x.index_select(1, order) for x in (self.scales.factor, self.scales.exponent))
        return Keys(self.key.index_select(1, order), self.value.ordered(order), Scales(factor, exponent), self.alike)

    def summed(self, base: Tensor, blocks: int, work: Workspace) -> Tensor:
        """Multiply values by scales, relative to 2^base of each list, ``[lists, 1]``, which is theirs if `alike`.

        Args:
            base: the unit.
            blocks: number of blocks.
            work: the memory of the result.

        Returns:
            values as `Columns.together` returns them.
        """
        return self.value.together(None if self.alike else self.scales.times(-base), blocks, work)
