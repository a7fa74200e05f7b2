"""SubGen as published, as a way to keep keys: a cache whose size follows the clusters of its keys."""

from dataclasses import dataclass

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.store import Store, StoreFactory
from hyperattention.policies.subgen_sketch import SketchSizes
from hyperattention.policies.subgen_store import SubGenStore


@dataclass(frozen=True)
class SubGen(StoreFactory):
    """Sketch old keys by their clusters and their values by their norms, and keep the latest keys as they are.

    out = z / tau,   z from draws by ||v||^2,   tau from uniform samples of clusters of radius delta

    Texts up to the budget are exact. Beyond it this is the published estimator (`SubGenSketch`) for all keys older than the
    window, merged with exact attention to those in it. `ClusterCentres` is the practical variant: one weighted set of keys
    within a fixed budget, and no guarantee.

    Source: Zandieh et al., 2024 (arXiv:2402.06082), SubGen; later called ClusterGen.   Differs: a window is exact, because
    the tokens of a step attend to one another before they are absorbed; no sinks, as published.
    Cost: m + s products a token, and m t + s a query and head beside the window, for m clusters, however many keys.
    Guarantee: numerator and normaliser unbiased; error within epsilon ||softmax||_2 ||V||_op of exact attention where keys
    are clusterable (see `SubGenSketch`). Where they are not, clusters are nearly as many as keys, and this raises.

    Args:
        delta: largest distance of a key from the centre of its cluster, keys as the model makes them, positions applied.
        samples: keys drawn from each cluster for the normaliser, t.
        value_samples: keys drawn with their values for the numerator, s.
        most_clusters: most clusters of a head; None for as many as the bytes of the budget hold. More than that raises when
            a text needs them, because they cannot be merged without losing the guarantee.

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
        """Make an empty store; neighbours share nothing."""
        return SubGenStore(self._sizes, room, layer=layer, seed=seed)
