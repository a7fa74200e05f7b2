"""Replace the keys of each cluster by their mean: a small error, and no sampling noise."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots
from hyperattention.check import positive

# distances held at once: 16 MiB in float32
_DISTANCES_AT_A_TIME = 2**22


@dataclass(frozen=True)
class ClusterMeans(Policy):
    """Cluster keys as the latest queries distinguish them, and keep the mean key and mean value of every cluster.

    k_c = mean_c k_j,   v_c = mean_c v_j,   log w_c = log n_c + correction / 2 mean_c (q . (k_j - k_c))^2

    A sample of a few among thousands of keys has weights in the tens, and a softmax over it is mostly noise; means have no
    noise. Means ignore the spread inside a cluster: the mean of the exponentials exceeds the exponential of the mean score,
    by half the variance of the scores if these are normal. `correction` is the share of this term that is added, estimated
    from the latest queries. Distances are those of scores, ||A (k_j - k_c)|| with A'A = E[q q'], by k-means whose first
    centres are evenly spaced in position.

    Source: clusters as in Zandieh et al., 2024 (arXiv:2402.06082), SubGen.   Differs: means in place of samples, k-means in
    place of online balls, the metric of the queries and the correction are ours.
    Cost: rounds * slots products per candidate.   Guarantee: none; total weight is kept except for the correction.

    Args:
        rounds: rounds of k-means.
        latest: number of latest queries to read.
        correction: share of half the variance that is added to log-weights.

    Raises:
        ValueError: if a count is not positive, or the correction is negative.
    """

    rounds: int = 4
    latest: int = 32
    correction: float = 0.5

    def __post_init__(self) -> None:
        positive("ClusterMeans", rounds=self.rounds, latest=self.latest)
        if not self.correction >= 0:
            raise ValueError(f"ClusterMeans(correction={self.correction}): correction must not be negative; 0 turns it off")

    @property
    def num_queries(self) -> int:
        """Number of latest queries to read."""
        return self.latest

    @property
    def weighted(self) -> bool:
        """True: clusters represent all of their keys."""
        return True

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Cluster, and keep means in the order of their mean positions."""
        old, num = full.candidates, full.num
        weight = torch.nan_to_num(old.log_weight.float().exp(), posinf=torch.finfo(torch.float32).max)
        k, v = old.k.float(), old.v.float()
        metric = _metric(full)  # [batch, kv_heads, head_dim, directions]
        cluster = _clusters(k @ metric, weight, num, self.rounds)
        total = _sums(weight[..., None], cluster, num)[..., 0]
        share = (weight / total.gather(2, cluster).clamp(min=torch.finfo(torch.float32).tiny))[..., None]
        means = [
            _sums(x * share, cluster, num) for x in (k, v, old.position.float()[..., None], old.score.float()[..., None])
        ]
        off = (k - means[0].gather(2, cluster[..., None].expand_as(k))) @ metric
        variance = _sums(off.square().sum(-1, keepdim=True) * share, cluster, num)[..., 0]
        log_weight = total.log() + self.correction / 2 * variance
        held = CacheSlots(
            means[0].to(old.k.dtype),
            means[1].to(old.v.dtype),
            log_weight.to(old.log_weight.dtype),
            means[2][..., 0].round().to(old.position.dtype),
            (means[3][..., 0] * total).to(old.score.dtype),
        )
        # empty clusters come last: they have no position
        order = means[2][..., 0].masked_fill(total == 0, torch.inf).argsort(dim=-1, stable=True)
        return held.take(order, held.log_weight.gather(2, order))


def _metric(full: CompressionRequest) -> Tensor:
    """Find A with A'A = E[q q'] over the latest queries, scaled: distances under it are differences of scores."""
    kv_heads, width = full.held.k.shape[1], full.held.k.shape[3]
    q = full.queries.float().unflatten(1, (kv_heads, -1)).flatten(2, 3) * full.scale
    if not q.shape[2]:
        return torch.eye(width, dtype=torch.float32, device=q.device).expand(*q.shape[:2], -1, -1)
    moment = q.transpose(2, 3) @ q / q.shape[2]
    value, vector = torch.linalg.eigh(moment)
    # fewer queries than channels span at most as many directions as there are queries; eigenvalues are in ascending order
    span = slice(max(0, width - q.shape[2]), None)
    return (vector * value.clamp(min=0).sqrt()[:, :, None])[..., span]


def _clusters(x: Tensor, weight: Tensor, num: int, rounds: int) -> Tensor:
    """Assign points to the nearest of `num` weighted means, ``[batch, kv_heads, points]``."""
    start = torch.linspace(0, x.shape[2] - 1, num, dtype=torch.float32, device=x.device).round().long()
    centre = x[:, :, start]
    nearest = start.new_zeros(x.shape[:3])
    step = max(1, _DISTANCES_AT_A_TIME // (x.shape[0] * x.shape[1] * num))
    for _ in range(rounds):
        nearest = torch.cat([_nearest(part, centre) for part in x.split(step, 2)], 2)
        total = _sums(weight[..., None], nearest, num)
        mean = _sums(x * weight[..., None], nearest, num) / total.clamp(min=torch.finfo(torch.float32).tiny)
        centre = torch.where(total > 0, mean, centre)
    return nearest


def _nearest(x: Tensor, centre: Tensor) -> Tensor:
    # one product gives |c|^2 - 2 x . c; the squares of the points do not change comparisons
    factors = torch.cat([centre * -2, centre.square().sum(-1, keepdim=True)], -1)
    return (pad(x, (0, 1), value=1.0) @ factors.transpose(2, 3)).argmin(-1)


def _sums(x: Tensor, cluster: Tensor, num: int) -> Tensor:
    """Add up rows by cluster, ``[batch, kv_heads, num, width]``."""
    total = x.new_zeros((*x.shape[:2], num, x.shape[3]))
    return total.scatter_add_(2, cluster[..., None].expand_as(x), x)
