"""Keep keys that are far from one another, each standing for those around it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.slots import CacheSlots

# centres that are added between two looks at all keys, and how many of the farthest keys compete for each place
_AT_ONCE, _RIVALS = 16, 4
# distances of what is no choice: an empty slot is one if nothing else is left, a centre never again
_EMPTY, _CENTRE = -1.0, -2.0


@dataclass(frozen=True)
class ClusterCentres(Policy):
    """Keep keys that are far from one another, each with the weight of all keys that are nearest to it.

    w_c = sum_{j nearest to c} w_j,   v_c = sum_{j nearest to c} w_j v_j / w_c

    This is SubGen *in practice*, self-normalised over the centres: not the estimator of the paper, with its own samples for
    numerator and denominator, and without its guarantee.

    Source: Zandieh et al., 2024 (arXiv:2402.06082), SubGen, the greedy k-center of its experiments; the traversal is that of
    Gonzalez, 1985.   Differs: weights and mean values; farthest keys are added several a look, each the farthest of the few
    that were farthest at the look, which is greedy but for rare exchanges; the first centre is the key nearest to the mean.
    Cost: `num` products a candidate, in num / 16 passes.
    Guarantee: total weight kept exactly, and with `mean_values` the weighted sum of the values; a score changes by no more
    than scale ||q|| times the distance to the centre.

    Args:
        mean_values: whether a centre gets the mean value of its cluster, in place of its own.
    """

    mean_values: bool = True

    @property
    def weighted(self) -> bool:
        """Centres stand for all."""
        return True

    def compress(self, full: CompressionRequest) -> CacheSlots:
        """Find centres, and count what is nearest to each."""
        old = full.candidates
        live, shape = old.live.flatten(0, 1), (*old.log_weight.shape[:2], full.num)
        points = old.k.flatten(0, 1).to(old.log_weight.dtype).masked_fill(~live[..., None], 0.0)
        # distances survive rounding better around the mean, where the traversal begins
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
    """Walk to the farthest key again and again.

    Args:
        points: keys around their mean.
        live: which of them there are.
        num: how many centres, fewer than keys.

    Returns:
        the centres, ascending, and which of them is nearest to each key.
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
        # a centre is its own, whatever rounding made of its distance
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
    """Choose the next centres among the keys that are now farthest from all: ``[lists, num]``."""
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
