"""Representatives: a few vectors that stand for all keys of a block when blocks are scored."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Representatives:
    """Stand for the keys of a block by the means of its parts, and by the keys farthest from every other representative.

    Means follow broad weight; the key that one query looks for is unlike its neighbours, hides in a mean, and so stands for
    itself (docs/log.md).
    Source: block means, Jiang et al., 2024 (arXiv:2407.02490); farthest-first traversal, Gonzalez, 1985.
    Differs: several means a block; the traversal begins at the means.
    Cost: a product for each representative and pooled query; O(keys * far) once.

    Args:
        means: equal runs of neighbours, each averaged.
        far: keys taken as they are.

    Raises:
        ValueError: if there is no mean, or `far` is negative.
    """

    means: int = 1
    far: int = 0

    def __post_init__(self) -> None:
        if self.means < 1 or self.far < 0:
            raise ValueError(f"{self!r}: give at least one mean, and no negative number of far keys")

    @property
    def num(self) -> int:
        """Representatives of a block."""
        return self.means + self.far

    def check(self, block_size: int) -> None:
        """Refuse blocks that the representatives cannot stand for.

        Args:
            block_size: keys in a block.

        Raises:
            ValueError: if the block does not fall into equal parts, or has fewer keys than representatives.
        """
        if block_size % self.means or self.num > block_size:
            raise ValueError(
                f"{self!r} cannot stand for blocks of {block_size} keys: use a multiple of {self.means}, at least {self.num}"
            )

    def choose(self, keys: Float[Tensor, "lists blocks block_size width"]) -> Float[Tensor, "lists blocks num width"]:
        """Average the parts, then walk to the farthest key again and again."""
        chosen = list(keys.unflatten(2, (self.means, -1)).mean(3).unbind(2))
        # neither of these products makes a temporary as large as the keys
        size = torch.linalg.vector_norm(keys, dim=-1).square()  # [lists, blocks, block_size]
        least = torch.full_like(size, torch.inf)
        for place in range(self.means + self.far - 1 if self.far else 0):
            last, product = chosen[place], torch.einsum("lbsw,lbw->lbs", keys, chosen[place])
            # squared distance but for a constant a key: ||k - c||^2 - ||k||^2
            least = torch.minimum(least, last.square().sum(-1, keepdim=True) - 2 * product)
            if place + 1 >= self.means:
                farthest = (size + least).argmax(-1)[..., None, None].expand(-1, -1, 1, keys.shape[3])
                chosen.append(keys.gather(2, farthest)[:, :, 0])
        return torch.stack(chosen, 2)

    def total(self, weight: Float[Tensor, "lists chunk blocks num"], block_size: int) -> Float[Tensor, "lists chunk blocks"]:
        """Add up the weights of a block's keys, given its representatives': far keys count once, means for the rest."""
        by_mean = weight[..., : self.means].sum(-1) * ((block_size - self.far) / self.means)
        return by_mean + weight[..., self.means :].sum(-1) if self.far else by_mean
