"""Representatives: a few vectors that replace all keys of a block when blocks are scored."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# products among the candidates of a batch of blocks: small enough for the CPU cache
_PRODUCT_BYTES = 4 * 2**20
# the same on any other device, where few large operations are faster
_DEVICE_PRODUCT_BYTES = 512 * 2**20
# number of candidates above which not all pairs are multiplied
_MANY = 64


@dataclass(frozen=True)
class Representatives:
    """Represent the keys of a block by the means of its parts, and by the keys farthest from every other representative.

    Means represent weight that many keys share. A key that only one query needs differs from its neighbours and is lost in a
    mean, so it is its own representative (docs/log.md).
    Source: block means, Jiang et al., 2024 (arXiv:2407.02490); farthest-first traversal, Gonzalez, 1985.
    Differs: several means per block; the traversal begins at the means.
    Cost: a product for each representative and pooled query; once, O(keys * min(candidates, far)) products of keys.

    Args:
        means: number of equal runs of neighbouring keys, each averaged.
        far: number of single keys.

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
        """Check that blocks can have these representatives.

        Args:
            block_size: number of keys in a block.

        Raises:
            ValueError: if the block cannot be cut into equal parts, or has fewer keys than representatives.
        """
        if block_size % self.means or self.num > block_size:
            raise ValueError(
                f"{self!r} cannot represent blocks of {block_size} keys: use a multiple of {self.means}, at least {self.num}"
            )

    def choose(
        self,
        keys: Float[Tensor, "lists blocks block_size width"],
        among: Float[Tensor, "lists blocks candidates width"] | None = None,
    ) -> Float[Tensor, "lists blocks num width"]:
        """Average the parts, then add the farthest candidate repeatedly.

        Args:
            keys: the keys of every block.
            among: keys of the block that may become representatives; all of them if None.

        Returns:
            means, then far keys.
        """
        means = keys.unflatten(2, (self.means, -1)).mean(3)
        if not self.far:
            return means
        among = keys if among is None else among
        if among.shape[2] > _MANY:
            return torch.cat([means, self._farthest_of_many(means, among)], 2)
        # all products among candidates at once, for as many blocks as fit in the CPU cache
        most = _PRODUCT_BYTES if keys.device.type == "cpu" else _DEVICE_PRODUCT_BYTES
        step = max(1, most // (4 * keys.shape[0] * among.shape[2] ** 2))
        far = [self._farthest(*some) for some in zip(means.split(step, 1), among.split(step, 1), strict=True)]
        return torch.cat([means, torch.cat(far, 1)], 2)

    def _farthest_of_many(self, means: Tensor, among: Tensor) -> Tensor:
        """Multiply candidates only with the last chosen one, because few of many candidates are chosen."""
        size, chosen = among.square().sum(3), list(means.unbind(2))
        least = torch.full_like(size, torch.inf)
        for place in range(self.means + self.far - 1):
            product = torch.einsum("lbsw,lbw->lbs", among, chosen[place])
            least = torch.minimum(least, chosen[place].square().sum(2, keepdim=True) - 2 * product)
            if place + 1 >= self.means:
                farthest = (size + least).argmax(2)[..., None, None].expand(-1, -1, 1, among.shape[3])
                chosen.append(among.gather(2, farthest)[:, :, 0])
        return torch.stack(chosen[self.means :], 2)

    def _farthest(self, means: Tensor, among: Tensor) -> Tensor:
        product = among @ among.transpose(2, 3)  # [lists, blocks, candidates, candidates]
        size = product.diagonal(dim1=2, dim2=3)
        # squared distance up to a constant per candidate: ||k - c||^2 - ||k||^2
        least = (means.square().sum(3)[:, :, None] - 2 * among @ means.transpose(2, 3)).amin(3)
        chosen = []
        for _ in range(self.far):
            chosen.append((size + least).argmax(2, keepdim=True))
            last = product.gather(2, chosen[-1][..., None].expand(-1, -1, 1, product.shape[3]))[:, :, 0]
            least = torch.minimum(least, size.gather(2, chosen[-1]) - 2 * last)
        return among.gather(2, torch.cat(chosen, 2)[..., None].expand(-1, -1, -1, among.shape[3]))

    def total(self, weight: Float[Tensor, "lists chunk blocks num"], block_size: int) -> Float[Tensor, "lists chunk blocks"]:
        """Sum the weights of a block's keys from those of its representatives: far keys count once, means for the rest."""
        by_mean = weight[..., : self.means].sum(-1) * ((block_size - self.far) / self.means)
        return by_mean + weight[..., self.means :].sum(-1) if self.far else by_mean
