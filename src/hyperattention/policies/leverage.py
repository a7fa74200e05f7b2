"""Keep the keys that differ most from all others, without reading queries."""

from dataclasses import dataclass

from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.policies.choose import keep_best
from hyperattention.sensitivity.leverage import leverage


@dataclass(frozen=True)
class Leverage(Policy):
    """Keep the keys with the largest leverage scores, with unchanged weights; queries are not read.

    tau_j = x_j' (X'X + lambda I)^-1 x_j,   x_j = k_j - mean,   lambda = ridge * trace(X'X) / head_dim

    Source: Kannan et al., 2024 (arXiv:2410.05462), LevAttention, for weights |q . k|^2.   Differs: centred keys and a ridge;
    a new choice among the remaining keys at every compression; softmax in place of the paper's polynomial.
    Cost: twice head_dim products per candidate.
    Guarantee: none for softmax, for which this is a heuristic; dropped keys are lost.

    Args:
        ridge: strength of the ridge, relative to the mean square of the centred keys.

    Raises:
        ValueError: if the ridge is negative.
    """

    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise ValueError(f"Leverage(ridge={self.ridge!r}): ridge must not be negative; 0 turns it off")

    @property
    def weighted(self) -> bool:
        """False: dropped keys are lost."""
        return False

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Keep the keys with the largest leverage scores."""
        old = full.candidates
        # an empty slot must not enter the covariance: live slots come first
        order = old.live.byte().argsort(dim=-1, descending=True, stable=True)
        keys = old.k.gather(2, order[..., None].expand(-1, -1, -1, old.k.shape[3]))
        score = leverage(keys.flatten(0, 1), old.live.flatten(0, 1).sum(-1, keepdim=True), self.ridge, centred=True)
        score = score.view(order.shape)
        return keep_best(score.new_zeros(order.shape).scatter(2, order, score), full)
