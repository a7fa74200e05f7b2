"""Ranking of pages of keys for a query, from a summary of each page."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.check import instance


class PageRank(ABC):
    """An estimate of the largest score in a page, from a summary that does not change once the page is full."""

    @property
    @abstractmethod
    def kernel_reach(self) -> float | None:
        """The weight of a summary's second half, if the rank is that of `Bounds`; None for any other rank.

        A kernel computes q . first + reach sum_i |q_i| second_i; a summary of one half has reach 0.
        """

    @abstractmethod
    def summarise(
        self, k: Float[Tensor, "batch kv_heads pages page head_dim"]
    ) -> Float[Tensor, "batch kv_heads pages width"]:
        """Summarise pages.

        Args:
            k: keys of full pages.

        Returns:
            one row per page, in the dtype of the keys.
        """

    @abstractmethod
    def rank(
        self,
        q: Float[Tensor, "batch kv_heads rows head_dim"],
        summary: Float[Tensor, "batch kv_heads pages width"],
        num: int,
    ) -> Float[Tensor, "batch kv_heads rows pages"]:
        """Score pages for queries.

        Args:
            q: queries, scaled.
            summary: summary of all pages.
            num: number of pages that will be read.

        Returns:
            scores, in the unit of key scores; -inf for pages that were excluded before scoring.
        """


@dataclass(frozen=True)
class Bounds(PageRank):
    """Rank pages by an upper bound on the scores of their keys, or by a point between the page's centre and this bound.

    score_P = q . c + reach sum_i |q_i| r_i,   c the middle and r half the range of the page's keys, channel by channel

    With reach 1 this is the smallest upper bound that the ranges give, max_{j in P} q . k_j <= score_P. Usually no key
    attains it: on a trained model reach 0.5 ranks pages better, in retrieval and loss (docs/log.md).

    Source: Tang et al., 2024 (arXiv:2406.10774), Quest, for reach 1.   Differs: the reach.
    Cost: two products per page.   Guarantee: an upper bound for reach 1, none below.

    Args:
        reach: position between the middle (0) and the bound (1).

    Raises:
        ValueError: if the reach is not between 0 and 1.
    """

    reach: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.reach <= 1.0:
            raise ValueError(f"Bounds(reach={self.reach}): reach must be between 0 (the middle) and 1 (the bound)")

    @property
    def kernel_reach(self) -> float | None:
        """The reach."""
        return self.reach

    def summarise(self, k: Tensor) -> Tensor:
        """Return the middle and half the range of every channel."""
        high, low = k.amax(3), k.amin(3)
        return torch.cat([(high + low) / 2, (high - low) / 2], -1)

    def rank(self, q: Tensor, summary: Tensor, num: int) -> Tensor:
        """Multiply the middle by the query, the range by its magnitudes."""
        return _scores(torch.cat([q, self.reach * q.abs()], -1), summary)


@dataclass(frozen=True)
class Midpoint(PageRank):
    """Rank pages by one product with a point between their bounds.

    score_P = q . (alpha high + (1 - alpha) low)
    Source: Zeng et al., 2025 (arXiv:2501.06807), MPCache, with alpha = 0.6.   Differs: nothing.
    Cost: one product per page.   Guarantee: none. It avoids comparisons, which are expensive under encryption and cheap
    here.

    Args:
        alpha: share of the upper bound.

    Raises:
        ValueError: if the share is not between 0 and 1.
    """

    alpha: float = 0.6

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"Midpoint(alpha={self.alpha}): alpha must be between 0 and 1")

    @property
    def kernel_reach(self) -> float | None:
        """No second half."""
        return 0.0

    def summarise(self, k: Tensor) -> Tensor:
        """Mix the bounds."""
        return self.alpha * k.amax(3) + (1 - self.alpha) * k.amin(3)

    def rank(self, q: Tensor, summary: Tensor, num: int) -> Tensor:
        """Multiply."""
        return _scores(q, summary)


@dataclass(frozen=True)
class TwoLevels(PageRank):
    """Rank pairs of neighbouring pages first, then only the pages of the best pairs.

    Source: Zeng et al., 2025 (arXiv:2501.06807), MPCache: clusters of 32 positions, of which half are kept, then of 16.
    Differs: the score of a pair is that of the mean of its two summaries, the maximum over all queries of the call; `keep`
    is a share.
    Cost: half a product per page for pairs, and one for every page of the kept pairs.   Guarantee: none.

    Args:
        by: ranks both levels.
        keep: share of the pairs that are kept.

    Raises:
        ValueError: if the share is not above 0 and at most 1.
        TypeError: if `by` is no ranking of pages.
    """

    by: PageRank = Midpoint()
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"TwoLevels(keep={self.keep}): keep must be above 0 and at most 1")
        instance("TwoLevels", PageRank, "Bounds()", by=self.by)

    @property
    def kernel_reach(self) -> float | None:
        """None: pages are ranked on two levels."""
        return None

    def summarise(self, k: Tensor) -> Tensor:
        """Summarise pages; the summary of a pair is computed from its pages."""
        return self.by.summarise(k)

    def rank(self, q: Tensor, summary: Tensor, num: int) -> Tensor:
        """Exclude pages by pairs, and rank the others."""
        pages = summary.shape[2]
        pairs = torch.nn.functional.pad(summary, (0, 0, 0, pages % 2)).unflatten(2, (-1, 2)).mean(3)
        coarse = self.by.rank(q, pairs, num).amax(2)
        count = min(coarse.shape[2], max(-(-num // 2), round(self.keep * coarse.shape[2])))
        best = coarse.topk(count, -1).indices.sort(-1).values
        page = (best[..., None] * 2 + torch.arange(2, dtype=torch.int64, device=q.device)).flatten(2)
        # [batch, kv_heads, survivors]
        beyond = page >= pages
        page = page.clamp(max=pages - 1)
        few = summary.gather(2, page[..., None].expand(-1, -1, -1, summary.shape[3]))
        score = self.by.rank(q, few, num).masked_fill(beyond[:, :, None], -torch.inf)
        whole = score.new_full((*score.shape[:3], pages), -torch.inf)
        # a page that pads the last pair must not overwrite itself
        return whole.scatter_reduce(3, page[:, :, None].expand(-1, -1, score.shape[2], -1), score, "amax")


def _scores(q: Tensor, summary: Tensor) -> Tensor:
    # summaries times queries: for few queries this order is two to three times as fast on a CPU as the other
    return (summary.to(q.dtype) @ q.transpose(2, 3)).transpose(2, 3)
