"""Blocks of neighbouring keys, of 4, 16, 64, ... keys and of one: what averages of queries are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.select.score.pooling import score_bytes
from hyperattention.select.score.scratch import Scratch

# float32 numbers held for each number of a key while keys are averaged
_KEY_NUMBERS = 6
# bound of the logarithm of relative distances of values: estimates only, which must not starve a key
MOST_LOG_VALUE = 2.0


@dataclass(frozen=True)
class KeyBlocks:
    """Blocks of equally many keys, whole ones alone.

    Args:
        size: keys in a block.
        mean: the mean of each, centred.
        variance: variances inside blocks; None where a block is one key.
        square: means of the squares; None where a block is one key.
        log_value: logarithm of how far values lie from the mean of the first ones, relative to these, averaged over blocks.
    """

    size: int
    mean: Float[Tensor, "lists blocks width"]
    variance: Float[Tensor, "lists blocks width"] | None
    square: Float[Tensor, "lists blocks width"] | None
    log_value: Float[Tensor, "lists blocks"]

    def first(self, one: int, count: int) -> "KeyBlocks":
        """Take the first blocks of one list of keys, and zeros behind the last."""

        def some(x: Tensor) -> Tensor:
            more = count - x.shape[1]
            return pad(x[one : one + 1], (*[0, 0] * (x.dim() - 2), 0, more)) if more > 0 else x[one : one + 1, :count]

        variance, square = (None if x is None else some(x) for x in (self.variance, self.square))
        return KeyBlocks(self.size, some(self.mean), variance, square, some(self.log_value))

    def of(self, one: int, index: Int[Tensor, "tiles some"], rooms: Sequence[Scratch]) -> "KeyBlocks":
        """Take some blocks of one list of keys for each tile, into rooms for means, variances and squares."""
        number = index.flatten()

        def some(x: Tensor, room: Scratch) -> Tensor:
            return torch.index_select(x[one], 0, number, out=room.take(len(number), x.shape[2])).view(*index.shape, -1)

        variance = None if self.variance is None else some(self.variance, rooms[1])
        square = None if self.square is None else some(self.square, rooms[2])
        log_value = self.log_value[one].index_select(0, number).view_as(index)
        return KeyBlocks(self.size, some(self.mean, rooms[0]), variance, square, log_value)


def blocks_of(
    k: Float[Tensor, "lists keys width"], v: Float[Tensor, "lists keys value_dim"], sizes: Sequence[int], num: int
) -> dict[int, KeyBlocks]:
    """Centre keys, and average them over blocks of several sizes.

    Args:
        k: the keys.
        v: their values.
        sizes: keys in a block, the smallest first, each a multiple of the one before.
        num: leading keys by which the others are centred and scaled, so that no tile looks ahead.

    Returns:
        the blocks of each size, in float32 or wider; keys behind the last whole block are in none.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    centre = k[:, :num].to(wide).mean(1, keepdim=True)
    mean = torch.cat([_finite(part.to(wide) - centre) for part in k.split(_step(k), 1)], 1)
    square, log_value, made, before = mean, _log_values(v, num).to(wide), {}, 1
    for size in sizes:
        variance = None
        if size > 1:
            square = _averaged(mean.square() if before == 1 else square, size // before)
            mean = _averaged(mean, size // before)
            log_value = _averaged(log_value[..., None], size // before)[..., 0]
            variance = (square - mean.square()).clamp_(min=0)
        made[size] = KeyBlocks(size, mean, variance, None if variance is None else square, log_value)
        before = size
    return made


def _step(x: Tensor) -> int:
    """Count the rows of every list that are converted at once."""
    return max(1, score_bytes(x.device) // (4 * _KEY_NUMBERS * x.shape[0] * max(1, x.shape[2])))


def _averaged(x: Float[Tensor, "lists blocks width"], several: int) -> Float[Tensor, "lists fewer width"]:
    """Average over whole blocks of several."""
    return x[:, : x.shape[1] // several * several].unflatten(1, (-1, several)).mean(2)


def _log_values(v: Tensor, num: int) -> Float[Tensor, "lists keys"]:
    """Tell how much a draw of each key moves an output, which lies near the mean of the values: within a bound."""
    first = v[:, :num].to(torch.promote_types(v.dtype, torch.float32))
    centre = torch.nan_to_num(first, nan=0.0, posinf=0.0, neginf=0.0).mean(1, keepdim=True)
    far = [_finite(part.to(centre.dtype) - centre).norm(dim=2) for part in v.split(_step(v), 1)]
    distance = torch.cat(far, 1)
    log = (distance / distance[:, :num].mean(1, keepdim=True)).log_().nan_to_num_(nan=0.0)
    return log.clamp_(-MOST_LOG_VALUE, MOST_LOG_VALUE)


def _finite(x: Tensor) -> Tensor:
    """A key or value that is not finite tells nothing."""
    return torch.nan_to_num_(x, nan=0.0, posinf=0.0, neginf=0.0)
