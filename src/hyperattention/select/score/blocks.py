"""Scores of blocks of keys: cheap stand-ins for the largest score that any key of a block has with a query.

A score has two halves: a summary of the keys, made once, and its product with pooled queries, made for every tile.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.check import positive


def by_block(x: Tensor, block_size: int, fill: float) -> Tensor:
    """Cut keys into blocks, the last filled up: ``[lists, keys, width]`` to ``[lists, blocks, block_size, width]``."""
    spare = -x.shape[1] % block_size
    x = pad(x, (0, 0, 0, spare), value=fill) if spare else x
    return x.unflatten(1, (-1, block_size))


class BlockRank(ABC):
    """How blocks are ranked for a tile."""

    @abstractmethod
    def summarise(self, k: Float[Tensor, "lists keys head_dim"], block_size: int, settled: int) -> tuple[Tensor, ...]:
        """Summarise every block of keys.

        Args:
            k: keys of each list.
            block_size: keys in a block.
            settled: leading keys that may be looked at by every tile that has a choice.

        Returns:
            tensors with an axis of blocks first after the lists, as `score` reads them.
        """

    @abstractmethod
    def score(self, query: Float[Tensor, "lists pooled head_dim"], summary: tuple[Tensor, ...], blocks: int) -> Tensor:
        """Score the first `blocks` blocks for pooled queries: ``[lists, pooled, blocks]``."""

    @abstractmethod
    def products(self, block_size: int, head_dim: int) -> float:
        """Count products of `head_dim` numbers spent on a block, for one pooled query."""


@dataclass(frozen=True)
class MeanKey(BlockRank):
    """Rank blocks by the product with their mean key.

    score_B = q . mean_{j in B} k_j
    Source: Jiang et al., 2024 (arXiv:2407.02490), block pattern.   Differs: nothing.
    Cost: one product a block.   Guarantee: none; one heavy key among others hides in the mean.
    """

    def summarise(self, k: Tensor, block_size: int, settled: int) -> tuple[Tensor, ...]:
        """Average every block; a partial last block over the keys it has."""
        count = by_block(torch.ones_like(k[:1, :, :1]), block_size, 0.0).sum(2)
        return (by_block(k, block_size, 0.0).sum(2) / count,)

    def score(self, query: Tensor, summary: tuple[Tensor, ...], blocks: int) -> Tensor:
        """Multiply queries and mean keys."""
        return query @ summary[0][:, :blocks].transpose(1, 2)

    def products(self, block_size: int, head_dim: int) -> float:
        """One product a block."""
        return 1.0


@dataclass(frozen=True)
class KeyBounds(BlockRank):
    """Rank blocks by an upper bound on their scores, from the least and greatest coordinates of their keys.

    score_B = sum_c max(q_c min_{j in B} k_jc, q_c max_{j in B} k_jc)  >=  max_{j in B} q . k_j
    Source: Tang et al., 2024 (arXiv:2406.10774), Quest.   Differs: nothing.
    Cost: two products a block.   Guarantee: an upper bound, loose for long blocks.
    """

    def summarise(self, k: Tensor, block_size: int, settled: int) -> tuple[Tensor, ...]:
        """Take the least and the greatest of every coordinate."""
        return by_block(k, block_size, torch.inf).amin(2), by_block(k, block_size, -torch.inf).amax(2)

    def score(self, query: Tensor, summary: tuple[Tensor, ...], blocks: int) -> Tensor:
        """Bound the scores of every block from above."""
        least, greatest = (x[:, :blocks].transpose(1, 2) for x in summary)
        return query.clamp(min=0) @ greatest + query.clamp(max=0) @ least

    def products(self, block_size: int, head_dim: int) -> float:
        """Two products a block."""
        return 2.0


@dataclass(frozen=True)
class KeySketch(BlockRank):
    """Rank blocks by the largest score of any of their keys, in the few dimensions where keys differ most.

    score_B = max_{j in B} (U q) . (U k_j),   U = leading principal directions of the first keys
    Source: Singhania et al., 2024 (arXiv:2406.02542), Loki, keys in their principal directions.   Differs: block maxima, and
    directions taken from the sequence's first keys alone, so that no tile looks ahead.
    Cost: block_size * dim / head_dim products a block.   Guarantee: none.

    Args:
        dim: numbers kept of each key.

    Raises:
        ValueError: if `dim` is not positive.
    """

    dim: int = 16

    def __post_init__(self) -> None:
        positive("KeySketch", dim=self.dim)

    def summarise(self, k: Tensor, block_size: int, settled: int) -> tuple[Tensor, ...]:
        """Project every key."""
        head = k[:, :settled].float()
        centred = head - head.mean(1, keepdim=True)
        # eigh refuses values that are not finite; such keys are ranked anyhow, as the rest of the contract allows
        _, directions = torch.linalg.eigh(torch.nan_to_num(centred.transpose(1, 2) @ centred))
        directions = directions[..., -min(self.dim, k.shape[-1]) :].to(k.dtype)
        return by_block(k @ directions, block_size, 0.0), directions

    def score(self, query: Tensor, summary: tuple[Tensor, ...], blocks: int) -> Tensor:
        """Multiply in few dimensions, and take the largest of each block."""
        sketch, directions = summary
        sketch = sketch[:, :blocks]
        score = (query @ directions) @ sketch.flatten(1, 2).transpose(1, 2)
        return score.unflatten(2, sketch.shape[1:3]).amax(3)

    def products(self, block_size: int, head_dim: int) -> float:
        """A short product for every key."""
        return block_size * min(self.dim, head_dim) / head_dim
