"""Drop once what the end of a prompt does not look at, and read the best pages of the rest."""

from dataclasses import dataclass, field

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.page_rank import TwoLevels
from hyperattention.cache.selecting import SelectingStore
from hyperattention.cache.store import Store, StoreFactory
from hyperattention.check import positive
from hyperattention.policies.look_once_store import LookOnceStore
from hyperattention.policies.top_pages import TopPages


@dataclass(frozen=True)
class LookOnce(StoreFactory):
    """Look at a prompt once, keep the share of its keys that its last queries attend to most, and then read by pages.

    s_j = sum_{last queries} softmax_i(scale q . k_i),   kept: sinks, window, and the largest s_j

    The eviction saves memory, the choice of pages saves time: a step reads `Room.budget` keys of those that are left. A step
    of more queries than choose pages is a prompt and has a look of its own, so that of a prompt in chunks the same share
    stays, as the last queries of each chunk see it. Keys of shorter steps stay until then: the next long step, such as a
    second question, has a look at all that is there, answers included. A prompt in chunks of at most `pages.most_queries`
    has no long step, and nothing of it is dropped.

    Source: Zeng et al., 2025 (arXiv:2501.06807), MPCache: look-once static eviction, then query-aware dynamic
    selection.   Differs: a share of the keys in place of a threshold for each data set; a fixed number of last queries in
    place of a fifth of the prompt; attention summed over them, with scale and causal mask, and each kv head keeps its own
    keys; layers do not share their choice, because after the eviction their pages hold different tokens.
    Cost: the scores of `latest` queries for each prompt; then that of `pages`.
    Guarantee: none; what is dropped is gone. All rows of a batch keep equally many, so that padded ones lose fewer.

    Args:
        keep: share of the tokens that stays, but never fewer than the budget.
        latest: queries that vote.
        pages: how a step reads what is left.

    Raises:
        ValueError: if the share is not above 0 and at most 1, the count not positive, or pages are shared between layers.
    """

    keep: float = 0.5
    latest: int = 32
    pages: TopPages = field(default_factory=lambda: TopPages(by=TwoLevels(), page=16))

    def __post_init__(self) -> None:
        positive("LookOnce", latest=self.latest)
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"LookOnce(keep={self.keep}): a share lies above 0 and is at most 1")
        if self.pages.share != 1:
            raise ValueError(
                f"LookOnce(pages={self.pages!r}): layers cannot share a choice, because each keeps tokens of its own; "
                "give share=1"
            )

    def store(self, room: CacheBudget, layer: int, seed: int, previous: Store | None) -> LookOnceStore:
        """Make an empty store; neighbours share nothing."""
        return LookOnceStore(_PageMaker(self.pages, room, layer, seed), keep=self.keep, latest=self.latest)


@dataclass(frozen=True)
class _PageMaker:
    """Make empty stores by pages, as a value that is copied and pickled with the store that asks for them."""

    pages: TopPages
    room: CacheBudget
    layer: int
    seed: int

    def __call__(self) -> SelectingStore:
        return self.pages.store(self.room, self.layer, self.seed, None)
