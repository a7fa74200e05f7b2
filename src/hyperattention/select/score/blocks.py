"""Scores of blocks of keys: cheap estimates of the largest score of any key of a block with a query.

A score has two parts: a summary of the keys, computed once, and its product with pooled queries, computed for every tile.
Blocks are grouped in *panels* of several neighbours; a coarse choice selects panels, a fine choice blocks inside them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.check import positive
from hyperattention.select.score.principal import principal_directions


def in_panels(x: Tensor, block_size: int, per_panel: int) -> Tensor:
    """Cut keys into panels of blocks; the last panel is padded with the last key.

    Args:
        x: ``[lists, keys, width]``, at least one key.
        block_size: number of keys in a block.
        per_panel: number of blocks in a panel.

    Returns:
        ``[lists, panels, per_panel, block_size, width]``.
    """
    spare = -x.shape[1] % (block_size * per_panel)
    x = torch.cat([x, x[:, -1:].expand(-1, spare, -1)], 1) if spare else x
    return x.unflatten(1, (-1, per_panel, block_size))


class BlockRank(ABC):
    """The ranking of blocks for a tile."""

    def basis(self, k: Float[Tensor, "lists keys head_dim"]) -> Tensor | None:
        """Return directions on which keys and queries are projected.

        Args:
            k: the leading keys, which every tile with a choice of blocks may read.

        Returns:
            ``[lists, head_dim, width]``, or None to use keys without projection.
        """
        return None

    @abstractmethod
    def summarise(self, k: Float[Tensor, "lists keys width"], block_size: int, per_panel: int) -> tuple[Tensor, ...]:
        """Summarise every block of projected keys: tensors ``[lists, panels, ...]``."""

    @abstractmethod
    def score(self, query: Float[Tensor, "lists pooled width"], summary: tuple[Tensor, ...]) -> Tensor:
        """Score blocks for pooled queries: ``[lists, pooled, blocks]``, the blocks of the first panel first."""

    @abstractmethod
    def width(self, head_dim: int) -> int:
        """Count the numbers kept of each key."""

    @abstractmethod
    def products(self, block_size: int) -> int:
        """Count products of `width` numbers spent on a block, for one pooled query."""


@dataclass(frozen=True)
class MeanKey(BlockRank):
    """Rank blocks by the product with their mean key.

    score_B = q . mean_{j in B} k_j
    Source: Jiang et al., 2024 (arXiv:2407.02490), block pattern.   Differs: nothing.
    Cost: one product per block.   Guarantee: none; the mean can hide a single heavy key.
    """

    def summarise(self, k: Tensor, block_size: int, per_panel: int) -> tuple[Tensor, ...]:
        """Return the mean key of every block."""
        return (in_panels(k, block_size, per_panel).mean(3),)

    def score(self, query: Tensor, summary: tuple[Tensor, ...]) -> Tensor:
        """Return products of queries and mean keys."""
        return query @ summary[0].flatten(1, 2).transpose(1, 2)

    def width(self, head_dim: int) -> int:
        """Whole keys."""
        return head_dim

    def products(self, block_size: int) -> int:
        """Count one product per block."""
        return 1


@dataclass(frozen=True)
class KeyBounds(BlockRank):
    """Rank blocks by an upper bound on their scores, from the minimum and maximum of each key coordinate.

    score_B = sum_c max(q_c min_{j in B} k_jc, q_c max_{j in B} k_jc)  >=  max_{j in B} q . k_j
    Source: Tang et al., 2024 (arXiv:2406.10774), Quest.   Differs: nothing.
    Cost: two products per block.   Guarantee: an upper bound, loose for long blocks.
    """

    def summarise(self, k: Tensor, block_size: int, per_panel: int) -> tuple[Tensor, ...]:
        """Return the minimum and the maximum of every coordinate."""
        panels = in_panels(k, block_size, per_panel)
        return panels.amin(3), panels.amax(3)

    def score(self, query: Tensor, summary: tuple[Tensor, ...]) -> Tensor:
        """Return an upper bound of the scores of every block."""
        least, greatest = (x.flatten(1, 2).transpose(1, 2) for x in summary)
        return query.clamp(min=0) @ greatest + query.clamp(max=0) @ least

    def width(self, head_dim: int) -> int:
        """Whole keys."""
        return head_dim

    def products(self, block_size: int) -> int:
        """Count two products per block."""
        return 2


@dataclass(frozen=True)
class KeySketch(BlockRank):
    """Rank blocks by the largest score of any of their keys, in a few principal directions of the keys.

    score_B = max_{j in B} (U q) . (U k_j),   U = leading principal directions of the first keys
    Source: Singhania et al., 2024 (arXiv:2406.02542), Loki, keys in their principal directions.   Differs: block maxima, and
    directions computed from the first keys of the sequence only, so that no tile looks ahead.
    Cost: block_size short products per block.   Guarantee: none.

    Args:
        dim: number of directions.

    Raises:
        ValueError: if `dim` is not positive.
    """

    dim: int = 16

    def __post_init__(self) -> None:
        positive("KeySketch", dim=self.dim)

    def basis(self, k: Tensor) -> Tensor:
        """Return the principal directions of some keys."""
        return principal_directions(k, self.width(k.shape[-1]))

    def summarise(self, k: Tensor, block_size: int, per_panel: int) -> tuple[Tensor, ...]:
        """Keep every key; within a panel, first the first keys of all blocks, then the second ones, ..."""
        return (in_panels(k, block_size, per_panel).transpose(2, 3).contiguous(),)

    def score(self, query: Tensor, summary: tuple[Tensor, ...]) -> Tensor:
        """Score every key, and return the maximum of each block."""
        panels, block_size, per_panel = summary[0].shape[1:4]
        best = (query @ summary[0].flatten(1, 3).transpose(1, 2)).unflatten(2, (panels, block_size, per_panel))
        while best.shape[3] > 1:  # pairwise maxima of contiguous halves: a reduction over a short axis is slow
            half = best.shape[3] // 2
            rest = best[:, :, :, 2 * half :]
            best = torch.maximum(best[:, :, :, :half], best[:, :, :, half : 2 * half])
            best = torch.cat([best, rest], 3) if rest.shape[3] else best
        return best.flatten(2)

    def width(self, head_dim: int) -> int:
        """Return `dim`, or the width of a key if that is smaller."""
        return min(self.dim, head_dim)

    def products(self, block_size: int) -> int:
        """Count one short product for every key."""
        return block_size
