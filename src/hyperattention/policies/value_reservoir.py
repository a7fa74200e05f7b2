"""An online sample of keys and values by squared value norm, from which SubGen estimates its numerator."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.coreset import Coreset
from hyperattention.random import uniform

# makes these draws independent of the clusters'
_PURPOSE = 2
# times held at once: 8 MiB in float64, which fits in the CPU cache
_TIMES_AT_A_TIME = 2**20


@dataclass(frozen=True)
class Drawn:
    """The drawn pairs, and the data for their weights.

    Args:
        k: key of each draw.
        v: value of each draw.
        norm: squared norm of each value; 0 for an empty slot.
        time: random arrival time of each pair in its slot; inf for an empty slot.
        total: sum of the squared norms of all values so far.
    """

    k: Float[Tensor, "batch kv_heads slots head_dim"]
    v: Float[Tensor, "batch kv_heads slots value_dim"]
    norm: Float[Tensor, "batch kv_heads slots"]
    time: Float[Tensor, "batch kv_heads slots"]
    total: Float[Tensor, "batch kv_heads"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """List the tensors, in the order of the arguments."""
        return self.k, self.v, self.norm, self.time, self.total

    @property
    def coreset(self) -> Coreset:
        """Weight the draws so that sums over them estimate sums over all keys.

        w = total / (slots ||v||^2)

        Returns:
            the draws.
        """
        share = self.total[..., None] / (self.norm * self.norm.shape[2])
        weight = share.masked_fill(self.norm == 0, 0.0).log()
        return Coreset(self.k, self.v, weight.to(torch.promote_types(self.k.dtype, torch.float32)))


class ValueReservoir:
    """Keep `slots` pairs, each drawn independently from all pairs so far, by the squared norm of its value.

    P(slot holds (k, v)) = ||v||^2 / sum_j ||v_j||^2

    In every slot each token gets an exponential arrival time of rate ||v||^2, and the token with the earliest time is kept.
    The last of n tokens is the earliest with probability ||v_n||^2 / sum_j ||v_j||^2, as in reservoir sampling. A value of
    norm zero adds nothing to any sum and is never drawn.

    Pairs are absorbed many at a time; on a CPU the results are bit-identical to absorbing one after another.

    Source: Zandieh et al., 2024 (arXiv:2402.06082), SubGen.   Differs: arrival times come from hashes, so that a token's
    draws depend only on its position.
    Cost: O(slots) per token, and O(slots) pairs of memory.   Guarantee: weighted sums over the slots are unbiased.

    Args:
        slots: number of pairs kept for each head.
        counters: seed and layer, which determine every draw.
    """

    def __init__(self, slots: int, *, counters: tuple[int, int] = (0, 0)) -> None:
        """Start empty."""
        self.slots, self.counters = slots, counters
        self.drawn: Drawn | None = None

    def absorb(
        self,
        k: Float[Tensor, "batch kv_heads new head_dim"],
        v: Float[Tensor, "batch kv_heads new value_dim"],
        position: Int[Tensor, " new"],
        live: Bool[Tensor, "batch new"],
    ) -> None:
        """Absorb pairs.

        Args:
            k: keys.
            v: their values.
            position: position of each pair in the text, which determines its draws.
            live: False for padding, which is never drawn.
        """
        if self.drawn is None:
            shape = (k.shape[0], k.shape[1], self.slots)
            norm = torch.zeros(shape, dtype=torch.float64, device=k.device)
            held = k.new_zeros((*shape, k.shape[3])), v.new_zeros((*shape, v.shape[3]))
            self.drawn = Drawn(*held, norm, torch.full_like(norm, torch.inf), norm[:, :, 0].clone())
        size = max(1, _TIMES_AT_A_TIME // max(1, self.drawn.norm.numel()))
        for start in range(0, k.shape[2], size):
            part = slice(start, start + size)
            self._race(self.drawn, k[:, :, part], v[:, :, part], position[part], live[:, part])

    def _race(self, held: Drawn, k: Tensor, v: Tensor, position: Tensor, live: Tensor) -> None:
        norm = v.double().square().sum(-1).masked_fill(~live[:, None], 0.0)  # [batch, kv_heads, new]
        heads, slots = (torch.arange(num, dtype=torch.int64, device=k.device)[:, None] for num in (k.shape[1], self.slots))
        chance = uniform((*self.counters, _PURPOSE, heads[:, None], slots, position.long()), k.device)
        time = torch.log1p(-chance).neg() / norm[:, :, None]  # [batch, kv_heads, slots, new]
        time = time.masked_fill(norm[:, :, None] == 0, torch.inf)
        # if two times are equal the earlier token is kept, as when absorbing one after another
        first = time.argmin(-1)
        best = time.gather(3, first[..., None])[..., 0]
        where = (best < held.time).nonzero(as_tuple=True)
        token = first[where]
        for to, source in ((held.k, k), (held.v, v), (held.norm, norm)):
            to[where] = source[where[0], where[1], token]
        held.time[where] = best[where]
        # one after another, because the order of a sum changes its rounding
        held.total.copy_(torch.cat([held.total[..., None], norm], -1).cumsum(-1)[..., -1])
