"""Products of averages of alike queries with stretches of keys, in floats or in 8-bit integers."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hyperattention.select.score.scratch import Scratch

# below any score, and far enough from the end of 32-bit integers to be subtracted from
HIDDEN = -(2**29)


@dataclass(frozen=True)
class AlikeProduct:
    """Averages of a few tiles, to be multiplied by keys of one list.

    Args:
        query: averages of all lists and groups.
        keys: the keys.
        unit: the score that one stands for.
        bar: what scores are compared with, in units.
        valid: tiles for which the product is precise enough.
        scores: memory for scores.
    """

    query: Tensor
    keys: Tensor
    unit: Float[Tensor, "tiles many 1"]
    bar: Tensor
    valid: Bool[Tensor, " tiles"]
    scores: Scratch

    @classmethod
    def of(cls, query: Tensor, keys: Tensor, unit: Tensor, seen: Tensor, valid: Tensor, scores: Scratch) -> "AlikeProduct":
        """Prepare a product of averages, ``[tiles, many, groups, width]``, whose log-sum-exps are about `seen`."""
        bar = (seen / unit).clamp(HIDDEN, -HIDDEN).to(scores.like.dtype)
        return cls(query.flatten(0, 2), keys, unit, bar, valid, scores)

    def largest(self, of: slice) -> Float[Tensor, "tiles many blocks"]:
        """Find the largest logarithm of a share that an average of each list gives these blocks."""
        keys = self.keys[of]
        score = self.scores.take(len(self.query), len(keys))
        # the operator behind torch._int_mm, which torch has no other name for
        multiply = torch.ops.aten.mm.out if score.dtype.is_floating_point else torch.ops.aten._int_mm.out
        multiply(self.query, keys.T, out=score)
        best = score.view(*self.bar.shape, -1).sub_(self.bar[..., None]).amax(2)
        return best.to(self.unit.dtype).mul_(self.unit)


def largest_shares(products: tuple[AlikeProduct, ...], of: slice) -> Float[Tensor, "tiles many blocks"]:
    """Find the logarithms of the largest shares of blocks, by the last product that is precise enough for a tile."""
    best = products[0].largest(of)
    for product in products[1:]:
        best = torch.where(product.valid[:, None, None], product.largest(of), best)
    return best
