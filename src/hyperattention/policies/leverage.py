"""Keep the keys that stand out from all others, whatever the queries will be."""

from dataclasses import dataclass

from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.policies.choose import keep_best
from hyperattention.select.locate.universal_set import leverage


@dataclass(frozen=True)
class Leverage(Policy):
    """Keep the keys with the largest leverage scores, with the weights they have: no query is asked.

    tau_j = x_j' (X'X + lambda I)^-1 x_j,   x_j = k_j - mean,   lambda = ridge * trace(X'X) / head_dim

    Source: Kannan et al., 2024 (arXiv:2410.05462), LevAttention, for weights |q . k|^2.   Differs: keys centred and a ridge;
    chosen again at every compression, among what is left; softmax in place of the paper's polynomial.
    Cost: one and a half times head_dim products a candidate.
    Guarantee: none for softmax, for which it is a heuristic; what is dropped is gone.

    Args:
        ridge: strength of the ridge, relative to the mean square of the centred keys.

    Raises:
        ValueError: if the ridge is negative.
    """

    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise ValueError(f"Leverage(ridge={self.ridge!r}): a ridge must not be negative; 0 leaves it out")

    @property
    def weighted(self) -> bool:
        """What is dropped is gone."""
        return False

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Keep what stands out."""
        old = full.candidates
        # an empty slot is no key, and must not enter the covariance: live ones come first
        order = old.live.byte().argsort(dim=-1, descending=True, stable=True)
        keys = old.k.gather(2, order[..., None].expand(-1, -1, -1, old.k.shape[3]))
        score = leverage(keys.flatten(0, 1), old.live.flatten(0, 1).sum(-1, keepdim=True), self.ridge)
        score = score.view(order.shape)
        return keep_best(score.new_zeros(order.shape).scatter(2, order, score), full)
