"""Keys and queries rounded to 8-bit integers, and a check of which tiles this is precise enough for."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

# the largest 8-bit integer, and the margin for later keys above the largest numbers of the first keys
_LARGEST, _ROOM = 127.0, 8.0
# standard deviation of the rounding error of a key's number, in steps
_ROUNDING = 12**-0.5
# largest standard deviation of the rounding error of a score, in nats: its exponential is then wrong by about as much
_NOISE = 0.6


@dataclass(frozen=True)
class EightBitKeys:
    """Keys rounded to 8-bit integers with one step for each channel, which the first keys determine.

    Later keys may be much larger than the first ones, so that they are clipped, or much smaller, so that rounding removes
    them. `precise` finds the tiles that this would harm; their scores need floats.

    Args:
        keys: the integers.
        step: what one stands for in each channel.
        fit: leading keys of each list before the first one that is out of range.
    """

    keys: Int8[Tensor, "lists keys width"]
    step: Float[Tensor, "lists 1 width"]
    fit: Int[Tensor, " lists"]

    @classmethod
    def of(cls, keys: Float[Tensor, "lists keys width"], first: Float[Tensor, "lists first width"]) -> "EightBitKeys":
        """Round keys.

        Args:
            keys: the keys, centred, all finite.
            first: the keys that determine the steps, so that no tile looks ahead.

        Returns:
            the rounded keys; keys out of range are clipped.
        """
        # a channel in which the first keys are all zero has the smallest step: any other number there is out of range
        step = (first.abs().amax(1, keepdim=True) * (_ROOM / _LARGEST)).clamp_(min=torch.finfo(keys.dtype).tiny)
        rounded = (keys / step).round_()
        outside = rounded.abs().amax(2) > _LARGEST
        fit = torch.where(outside.any(1), outside.byte().argmax(1), keys.shape[1])
        return cls(rounded.clamp_(-_LARGEST, _LARGEST).to(torch.int8), step, fit)

    def precise(
        self, one: int, scaled: Float[Tensor, "tiles *rows width"], known: Int[Tensor, " tiles"]
    ) -> Bool[Tensor, " tiles"]:
        """Tell which tiles may use the integers: all keys that they see fit, and no score is much changed by rounding.

        Args:
            one: number of the list of keys.
            scaled: queries of each tile times `step`.
            known: leading keys whose scores the tile uses.

        Returns:
            which tiles; this depends only on their own queries, on the first keys, and on keys that they see.
        """
        noise = torch.linalg.vector_norm(scaled, dim=-1).flatten(1).amax(1) * _ROUNDING
        return (known <= self.fit[one]) & (noise <= _NOISE)


def rounded_queries(
    scaled: Float[Tensor, "*sets rows width"],
) -> tuple[Int8[Tensor, "*sets rows width"], Float[Tensor, "*sets 1"]]:
    """Round queries to 8-bit integers, with one unit for each set of rows.

    Args:
        scaled: queries times the steps of the keys.

    Returns:
        the integers, and the score that one stands for.
    """
    unit = (scaled.abs().amax((-2, -1)) / _LARGEST).clamp_(min=torch.finfo(scaled.dtype).tiny)[..., None]
    return (scaled / unit[..., None]).round_().to(torch.int8), unit
