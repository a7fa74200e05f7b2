"""Page selection without eviction: all keys stay in memory, and a decoding step reads the best pages."""

from dataclasses import dataclass, field

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.page_rank import Bounds, PageRank
from hyperattention.cache.selecting import SelectingStore
from hyperattention.cache.store import Store, StoreFactory
from hyperattention.check import instance, positive


@dataclass(frozen=True)
class TopPages(StoreFactory):
    """Keep all keys, and let each query read sinks, window and its best pages.

    A kv head reads the pages that are best for any query head that shares it. With `draws`, some of the keys read are drawn
    from all other pages and weighted, so that they represent the keys not read.

    Source: Tang et al., 2024 (arXiv:2406.10774), Quest, which is ``TopPages(by=Bounds(), page=16)``; neighbouring layers
    that share a choice: Zeng et al., 2025 (arXiv:2501.06807), MPCache.   Differs: pages of 8 keys, ranked with a reach below
    1; sinks and window are always read; draws; heads of a group share their pages.
    Cost: the summaries of all pages, 2 / page of the keys for `Bounds`, and `CacheBudget.budget` keys per head and step.
    Guarantee: none for the pages; the draws are unbiased for the keys outside the pages.

    Args:
        by: ranks pages.
        page: number of keys in a page.
        draws: number of keys drawn from other pages, part of the budget.
        most_queries: most queries of a step for which pages are chosen; a longer step, such as a prompt, reads all keys.
        share: number of neighbouring layers that use one choice of pages.
        first: number of first layers that choose pages separately.

    Raises:
        ValueError: if a count is out of range.
        TypeError: if `by` is no ranking of pages.
    """

    by: PageRank = field(default_factory=lambda: Bounds(0.5))
    page: int = 8
    draws: int = 0
    most_queries: int = 32
    share: int = 1
    first: int = 2

    def __post_init__(self) -> None:
        instance("TopPages", PageRank, "Bounds()", by=self.by)
        positive("TopPages", page=self.page, most_queries=self.most_queries, share=self.share)
        if self.draws < 0 or self.first < 0:
            raise ValueError(f"TopPages(draws={self.draws}, first={self.first}): counts must not be negative")

    def store(self, room: CacheBudget, layer: int, seed: int, previous: Store | None) -> SelectingStore:
        """Make the store of a layer; it reuses the pages of the previous layer unless this layer chooses its own."""
        need = room.sinks + room.window + 2 * self.page + self.draws
        if room.budget < need:
            raise ValueError(
                f"budget={room.budget} leaves no page of {self.page} besides {room.sinks} sinks, {room.window} window keys "
                f"and {self.draws} draws: give at least {need}"
            )
        borrows = layer >= self.first and (layer - self.first) % self.share > 0
        lender = (previous.lender or previous) if borrows and isinstance(previous, SelectingStore) else None
        return SelectingStore(
            self.by,
            room,
            page=self.page,
            draws=self.draws,
            most_queries=self.most_queries,
            lender=lender,
            layer=layer,
            seed=seed,
        )
