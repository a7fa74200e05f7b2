"""Drop once the keys that the end of a prompt does not attend to, and read the best pages of the rest."""

from dataclasses import dataclass, field

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.page_rank import TwoLevels
from hyperattention.cache.selecting import SelectingStore
from hyperattention.cache.store import Store, StoreFactory
from hyperattention.check import instance, positive
from hyperattention.policies.look_once_store import LookOnceStore
from hyperattention.policies.top_pages import TopPages


@dataclass(frozen=True)
class LookOnce(StoreFactory):
    """Keep the share of a prompt's keys that its last queries attend to most, then read these keys by pages.

    s_j = sum_{last queries} softmax_i(scale q . k_i),   kept: sinks, window, and the largest s_j

    The eviction saves memory, the choice of pages saves time: a step reads `CacheBudget.budget` of the kept keys. A step
    with more than `pages.most_queries` queries counts as a prompt and evicts keys. For a prompt in chunks the same share is
    kept, by the attention of the last queries of each chunk. Keys of shorter steps stay until the next long step, such as a
    second question, which evicts among all keys, answers included. A prompt in chunks of at most `pages.most_queries`
    queries has no long step, and none of its keys is dropped.

    Source: Zeng et al., 2025 (arXiv:2501.06807), MPCache: look-once static eviction, then query-aware dynamic
    selection.   Differs: a share of the keys in place of a threshold for each data set; a fixed number of last queries in
    place of a fifth of the prompt; attention summed over them, with scale and causal mask, and each kv head keeps its own
    keys; layers do not share their choice, because after the eviction their pages hold different tokens.
    Cost: the scores of `latest` queries for each prompt; then that of `pages`.
    Guarantee: none; dropped keys are lost. All rows of a batch keep equally many keys, so padded rows lose fewer.

    Args:
        keep: share of the tokens to keep, but never fewer than the budget.
        latest: number of last queries whose attention counts.
        pages: how a step reads the kept keys.

    Raises:
        ValueError: if `keep` is not in (0, 1], `latest` is not positive, or layers share their choice of pages.
        TypeError: if `pages` is no `TopPages`.
    """

    keep: float = 0.5
    latest: int = 32
    pages: TopPages = field(default_factory=lambda: TopPages(by=TwoLevels(), page=16))

    def __post_init__(self) -> None:
        positive("LookOnce", latest=self.latest)
        instance("LookOnce", TopPages, "TopPages()", pages=self.pages)
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"LookOnce(keep={self.keep}): keep must be above 0 and at most 1")
        if self.pages.share != 1:
            raise ValueError(
                f"LookOnce(pages={self.pages!r}): layers cannot share a choice, because each keeps its own tokens; "
                "give share=1"
            )

    def store(self, room: CacheBudget, layer: int, seed: int, previous: Store | None) -> LookOnceStore:
        """Make an empty store; layers share nothing."""
        return LookOnceStore(_PageMaker(self.pages, room, layer, seed), keep=self.keep, latest=self.latest)


@dataclass(frozen=True)
class _PageMaker:
    """Make empty stores with pages: a value, so that it can be copied and pickled with the store that uses it."""

    pages: TopPages
    room: CacheBudget
    layer: int
    seed: int

    def __call__(self) -> SelectingStore:
        return self.pages.store(self.room, self.layer, self.seed, None)
