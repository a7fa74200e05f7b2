"""Keep keys that are far from one another; each represents the keys near it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots

# centres that are added per pass over all keys, and the number of farthest keys that are candidates for each centre
_AT_ONCE, _RIVALS = 16, 4
# distances that exclude a choice: an empty slot is chosen only if no key is left, a centre never again
_EMPTY, _CENTRE = -1.0, -2.0


@dataclass(frozen=True)
class ClusterCentres(Policy):
    """Keep keys that are far from one another, each with the total weight of the keys nearest to it.

    w_c = sum_{j nearest to c} w_j,   v_c = sum_{j nearest to c} w_j v_j / w_c

    This is the practical variant of SubGen, self-normalised over the centres. It is not the estimator of the paper, which
    has separate samples for numerator and denominator, and it does not have the paper's guarantee.

    Source: Zandieh et al., 2024 (arXiv:2402.06082), SubGen, the greedy k-center of its experiments; the traversal is that of
    Gonzalez, 1985.   Differs: weights and mean values; several farthest keys are added per pass, each the farthest of the
    few keys that were farthest in that pass, which is greedy except for rare exchanges; the first centre is the key nearest
    to the mean.
    Cost: `num` products per candidate, in num / 16 passes.
    Guarantee: the total weight is kept exactly, and with `mean_values` also the weighted sum of the values; a score changes
    by at most scale ||q|| times the distance to the centre.

    Args:
        mean_values: whether a centre gets the mean value of its cluster in place of its own value.
    """

    mean_values: bool = True

    @property
    def weighted(self) -> bool:
        """True: the centres represent all keys."""
        return True

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Find centres, and sum the weights of the keys nearest to each."""
        old = full.candidates
        live, shape = old.live.flatten(0, 1), (*old.log_weight.shape[:2], full.num)
        points = old.k.flatten(0, 1).to(old.log_weight.dtype).masked_fill(~live[..., None], 0.0)
        # distances have smaller rounding errors around the mean, where the traversal begins
        points = points - points.sum(1, keepdim=True) / live.sum(1).clamp(min=1)[:, None, None]
        index, nearest = _centres(points, live, full.num)
        weight = old.log_weight.flatten(0, 1).double().exp()
        total = weight.new_zeros(index.shape).scatter_add_(1, nearest, weight)
        kept = old.take(index.view(shape), total.log().view(shape))
        if not self.mean_values:
            return kept
        part = old.v.flatten(0, 1).masked_fill(~live[..., None], 0.0) * weight[..., None]
        mean = part.new_zeros(*index.shape, part.shape[2])
        mean = (
            mean.scatter_add_(1, nearest[..., None].expand_as(part), part) / total.clamp(min=torch.finfo().tiny)[..., None]
        )
        return CacheSlots(kept.k, mean.view(*shape, -1).to(old.v.dtype), *kept.tensors[2:])


def _centres(
    points: Float[Tensor, "lists keys width"], live: Bool[Tensor, "lists keys"], num: int
) -> tuple[Int[Tensor, "lists num"], Int[Tensor, "lists keys"]]:
    """Add the farthest key as a centre, repeatedly.

    Args:
        points: keys minus their mean.
        live: which slots hold a key.
        num: number of centres, fewer than keys.

    Returns:
        the centres, ascending, and the index of the nearest centre of each key.
    """
    size = points.square().sum(2)
    nearest = torch.zeros_like(live, dtype=torch.int64)
    least = torch.full_like(size, torch.inf).masked_fill_(~live, _EMPTY)
    new, chosen = size.masked_fill(~live, torch.inf).argmin(1, keepdim=True), []
    count = 0
    while True:
        chosen.append(new)
        wide = new[..., None].expand(-1, -1, points.shape[2])
        gap = size[..., None] + size.gather(1, new)[:, None] - 2 * points @ points.gather(1, wide).transpose(1, 2)
        gap.clamp_(min=0.0).masked_fill_(~live.gather(1, new)[:, None], torch.inf)
        here, which = gap.min(2)
        closer = here < least
        nearest, least = torch.where(closer, which + count, nearest), torch.where(closer, here, least)
        # a centre is nearest to itself, even if rounding makes its distance positive
        nearest.scatter_(
            1, new, torch.arange(count, count + new.shape[1], dtype=torch.int64, device=new.device).expand_as(new)
        )
        least.scatter_(1, new, _CENTRE)
        count += new.shape[1]
        if count == num:
            break
        new = _farthest(points, least, min(_AT_ONCE, num - count))
    index, order = torch.cat(chosen, 1).sort(1)
    return index, order.argsort(1).gather(1, nearest)


def _farthest(points: Tensor, least: Tensor, num: int) -> Tensor:
    """Choose the next centres among the keys that are now farthest from all centres: ``[lists, num]``."""
    least, pool = least.topk(min(least.shape[1], _RIVALS * num), 1)
    rivals = points.gather(1, pool[..., None].expand(-1, -1, points.shape[2]))
    size = rivals.square().sum(2)
    gap = (size[:, None] + size[..., None] - 2 * rivals @ rivals.transpose(1, 2)).clamp_(min=0.0)
    chosen = []
    for _ in range(num):
        chosen.append(least.argmax(1, keepdim=True))
        apart = gap.gather(1, chosen[-1][..., None].expand(-1, -1, gap.shape[2]))[:, 0]
        least = torch.minimum(least, apart).scatter_(1, chosen[-1], _CENTRE)
    return pool.gather(1, torch.cat(chosen, 1))
