"""SubGen as published, as a cache: its size grows with the number of clusters of the keys."""

from dataclasses import dataclass

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.store import Store, StoreFactory
from hyperattention.policies.subgen_sketch import SketchSizes
from hyperattention.policies.subgen_store import SubGenStore


@dataclass(frozen=True)
class SubGen(StoreFactory):
    """Replace old keys and values by a sketch (samples by cluster and by value norm), and keep the latest keys unchanged.

    out = z / tau,   z from draws by ||v||^2,   tau from uniform samples of clusters of radius delta

    Texts up to the budget are exact. Longer texts use the published estimator (`SubGenSketch`) for all keys older than the
    window, merged with exact attention over the window. `ClusterCentres` is the practical variant: one weighted set of keys
    within a fixed budget, without a guarantee.

    Source: Zandieh et al., 2024 (arXiv:2402.06082), SubGen; later called ClusterGen.   Differs: a window is exact, because
    the tokens of a step attend to one another before they are absorbed; there are no attention sinks, as in the paper.
    Cost: m + s products per token, and m t + s per query and head besides the window, for m clusters and any number of keys.
    Guarantee: numerator and normaliser unbiased; error within epsilon ||softmax||_2 ||V||_op of exact attention if the keys
    are clusterable (see `SubGenSketch`). If they are not, there are nearly as many clusters as keys, and a ValueError is
    raised.

    Args:
        delta: largest distance of a key from the centre of its cluster; keys are those of the model after position encoding.
        samples: number of keys drawn from each cluster for the normaliser, t.
        value_samples: number of keys drawn with their values for the numerator, s.
        most_clusters: largest number of clusters of a head; None for as many as fit in the bytes of the budget. A text that
            needs more raises ValueError, because clusters cannot be merged without losing the guarantee.

    Raises:
        ValueError: if `delta` is negative or not finite, or a number is not positive.

    Example:
        >>> SubGen(delta=2.0)
        SubGen(delta=2.0, samples=4, value_samples=64, most_clusters=None)
    """

    delta: float
    samples: int = 4
    value_samples: int = 64
    most_clusters: int | None = None

    def __post_init__(self) -> None:
        _ = self._sizes

    @property
    def _sizes(self) -> SketchSizes:
        return SketchSizes(self.delta, self.samples, self.value_samples, self.most_clusters)

    def store(self, room: CacheBudget, layer: int, seed: int, previous: Store | None) -> SubGenStore:
        """Make an empty store; layers share nothing."""
        return SubGenStore(self._sizes, room, layer=layer, seed=seed)
