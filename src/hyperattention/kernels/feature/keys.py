"""Keys, their scales, and what each adds to a sum."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.kernels.feature.columns import Columns
from hyperattention.kernels.feature.scales import Scales


@dataclass(frozen=True)
class Keys:
    """Keys in order, and what each adds to a sum.

    Args:
        key: features, ``[lists, keys, features]``.
        value: what is summed.
        scales: of each key, ``[lists, keys]``; weights have their power.
    """

    key: Tensor
    value: Columns
    scales: Scales

    @property
    def alike(self) -> bool:
        """Whether all keys of a list have the same scale, a power of two: relative to it, each is 1."""
        factor, exponent = self.scales.factor, self.scales.exponent
        same = (exponent == exponent[:, :1]) & (exponent > -torch.inf) & (factor == 1)
        return bool(same.all())

    def of(self, lists: slice, keys: slice) -> "Keys":
        """Select some keys of some lists."""
        at = lists, keys
        return Keys(self.key[at], self.value[at], self.scales[at])

    def ordered(self, order: Tensor) -> "Keys":
        """Put the keys of all lists into another order."""
        factor, exponent = (x.index_select(1, order) for x in (self.scales.factor, self.scales.exponent))
        return Keys(self.key.index_select(1, order), self.value.ordered(order), Scales(factor, exponent))

    def scaled(self, base: Tensor, alike: bool) -> Tensor:
        """Multiply features by their scales, relative to 2^base of each list, ``[lists, 1]``, which is theirs if `alike`."""
        if alike:
            return self.key.to(base.dtype)
        return self.key * self.scales.times(-base)[..., None]
