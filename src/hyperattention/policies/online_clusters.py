"""Online clusters of keys, with uniform samples of every cluster, from which SubGen estimates its normaliser."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.random import uniform

# makes these draws independent of the reservoir's
_PURPOSE = 1
# tokens absorbed at once, and the distances to all centres that may be held for them: 16 MiB in float32
_TOKENS_AT_A_TIME = 512
_DISTANCES_AT_A_TIME = 2**22
# number of positions that break ties between equal hash values
_TIES = 2**20


@dataclass(frozen=True)
class Clusters:
    """The clusters of each head; slots from `num` on are empty.

    Args:
        centre: the key that opened each cluster.
        sample: keys of each cluster, drawn uniformly and independently of one another.
        ticket: the random number by which each sample was drawn, the smallest of its cluster; inf if there is none.
        count: number of keys in each cluster.
        num: number of clusters of each head.
    """

    centre: Float[Tensor, "batch kv_heads clusters head_dim"]
    sample: Float[Tensor, "batch kv_heads clusters samples head_dim"]
    ticket: Float[Tensor, "batch kv_heads clusters samples"]
    count: Int[Tensor, "batch kv_heads clusters"]
    num: Int[Tensor, "batch kv_heads"]

    @classmethod
    def none(cls, k: Float[Tensor, "batch kv_heads keys head_dim"], room: int, samples: int) -> "Clusters":
        """Allocate empty clusters.

        Args:
            k: keys with the batch, heads, width and dtype of the clusters.
            room: number of cluster slots of each head.
            samples: number of keys drawn from each cluster.

        Returns:
            empty clusters.
        """
        shape = (k.shape[0], k.shape[1], room)
        ticket = torch.full((*shape, samples), torch.inf, dtype=torch.float64, device=k.device)
        count = torch.zeros(shape, dtype=torch.int64, device=k.device)
        sample = k.new_zeros((*shape, samples, k.shape[3]))
        return cls(k.new_zeros((*shape, k.shape[3])), sample, ticket, count, torch.zeros_like(count[:, :, 0]))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """List the tensors, in the order of the arguments."""
        return self.centre, self.sample, self.ticket, self.count, self.num


class OnlineClusters:
    """Cluster keys one by one around the first key of each cluster, and keep uniform samples of every cluster.

    A key joins the nearest centre if that is within `delta`, and opens a cluster otherwise. Each of the `samples` slots of
    a cluster keeps the key with the smallest of its own uniform numbers: of n_c keys, the last has it with probability 1 /
    n_c, as in reservoir sampling. Two centres are farther than `delta` apart, so keys in m balls of diameter `delta` open at
    most m clusters. The number of slots is doubled when needed.

    Keys are absorbed many at a time; the results are bit-identical to absorbing one after another.

    Source: Zandieh et al., 2024 (arXiv:2402.06082), SubGen.   Differs: random replacement uses minima of hashes, so that a
    token's draws depend only on its position.
    Cost: one distance per key and centre, and O(samples) per key; memory of `samples` + 1 keys per cluster.
    Guarantee: each slot is uniform over its cluster, and independent of the others.

    Args:
        delta: largest distance of a key from its centre.
        samples: number of keys drawn from each cluster.
        most: largest number of clusters of a head; None for no limit.
        counters: seed and layer, which determine every draw.
    """

    def __init__(self, delta: float, samples: int, *, most: int | None = None, counters: tuple[int, int] = (0, 0)) -> None:
        """Know no key."""
        self.delta, self.samples, self.most, self.counters = delta, samples, most, counters
        self.clusters: Clusters | None = None

    def absorb(
        self,
        k: Float[Tensor, "batch kv_heads new head_dim"],
        position: Int[Tensor, " new"],
        live: Bool[Tensor, "batch new"],
    ) -> None:
        """Absorb keys; raise ValueError if a head needs more than `most` clusters.

        Args:
            k: the keys, in the order of the text.
            position: position of each key in the text, which determines its draws.
            live: False for padding, which joins no cluster.
        """
        if self.clusters is None:
            self.clusters = Clusters.none(k, 1, self.samples)
        start = 0
        while start < k.shape[2]:
            most = _DISTANCES_AT_A_TIME // max(1, self._held.count.numel(), self._held.num.numel() * self.samples)
            part = slice(start, start + max(1, min(_TOKENS_AT_A_TIME, most)))
            start = part.stop
            keys = k[:, :, part].flatten(0, 1)
            counted = live[:, None, part].expand(-1, k.shape[1], -1).flatten(0, 1)
            cluster = self._assign(keys.to(torch.promote_types(k.dtype, torch.float32)), counted)
            self._draw(keys, position[part], cluster, counted)

    def _assign(self, k: Tensor, live: Tensor) -> Tensor:
        """Find the cluster of every key, and open missing clusters: ``[lists, new]``."""
        near, cluster = self._nearest(k)
        num = self._held.num.flatten().clone()
        opens = (near > self.delta) & live
        while bool(opens.any()):
            # in every list, find the first key that is too far from all earlier centres; the keys before it are assigned
            lists = opens.any(1).nonzero()[:, 0]
            token = opens[lists].to(torch.uint8).argmax(1)
            self._make_room(num, lists)
            new, at = num[lists], int(token.min())
            centre = k[lists, token]
            self._held.centre.flatten(0, 1)[lists, new] = centre.to(self._held.centre.dtype)
            distance = _distances(k[lists, at:], centre[:, None])[..., 0]
            place = torch.arange(at, k.shape[1], dtype=torch.int64, device=k.device)
            old = near[lists, at:]
            # at equal distance the older centre gets the key, as with argmin
            closer = (place > token[:, None]) & (distance < old) | (place == token[:, None])
            near[lists, at:] = distance.where(closer, old)
            cluster[lists, at:] = new[:, None].where(closer, cluster[lists, at:])
            num[lists] += 1
            opens = (near > self.delta) & live
        self._held.num.copy_(num.view_as(self._held.num))
        return cluster

    def _nearest(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Find the centre nearest to each key, and its distance; inf if there is no centre."""
        num = self._held.num.flatten()
        most = int(num.max()) if num.numel() else 0
        if most == 0:
            return k.new_full(k.shape[:2], torch.inf), torch.zeros(k.shape[:2], dtype=torch.int64, device=k.device)
        distance = _distances(k, self._held.centre.flatten(0, 1)[:, :most].to(k.dtype))
        distance.masked_fill_(torch.arange(most, dtype=torch.int64, device=k.device) >= num[:, None, None], torch.inf)
        cluster = distance.argmin(-1)
        return distance.gather(2, cluster[..., None])[..., 0], cluster

    def _make_room(self, num: Tensor, lists: Tensor) -> None:
        """Make space for one more cluster in some lists; full space is doubled, so that few keys cause a copy."""
        old, need = self._held, int(num[lists].max()) + 1
        if self.most is not None and need > self.most:
            head = int(lists[num[lists].argmax()]) % old.num.shape[1]
            raise ValueError(
                f"head {head} of layer {self.counters[1]} needs more than {self.most} clusters of radius "
                f"delta={self.delta}: its keys are not clusterable at this radius; give a larger delta=, more "
                "most_clusters=, or a larger budget"
            )
        room = old.count.shape[2]
        if need <= room:
            return
        more = 2 * room if self.most is None else min(2 * room, self.most)
        self.clusters = Clusters.none(old.centre, more, self.samples)
        for to, source in zip(self.clusters.tensors[:-1], old.tensors[:-1], strict=True):
            to[:, :, :room] = source
        self.clusters.num.copy_(old.num)

    def _draw(self, k: Tensor, position: Tensor, cluster: Tensor, live: Tensor) -> None:
        """Count the keys of each cluster, and keep the keys with the smallest tickets."""
        held = self._held
        held.count.view(-1, held.count.shape[2]).scatter_add_(1, cluster, live.long())
        heads, device = torch.arange(held.num.shape[1], dtype=torch.int64, device=k.device), k.device
        slots = torch.arange(self.samples, dtype=torch.int64, device=device)
        ticket = uniform((*self.counters, _PURPOSE, heads[:, None, None], slots, position.long()[:, None]), device)
        # if hashes are equal the earlier key gets the slot, whether the later key is absorbed with it or after it
        ticket = ticket + (position.double() % _TIES)[:, None] / (_TIES * 2.0**32)  # [kv_heads, new, samples]
        ticket = ticket.expand(held.num.shape[0], -1, -1, -1).flatten(0, 1).masked_fill(~live[..., None], torch.inf)
        index = cluster[..., None].expand_as(ticket)
        best = held.ticket.flatten(0, 1)
        before = best.gather(1, index)
        best.scatter_reduce_(1, index, ticket, "amin")
        lists, token, slot = ((ticket < before) & (ticket == best.gather(1, index))).nonzero(as_tuple=True)
        held.sample.flatten(0, 1)[lists, cluster[lists, token], slot] = k[lists, token]

    @property
    def _held(self) -> Clusters:
        if self.clusters is None:
            raise ValueError("no key was clustered yet: absorb keys first")
        return self.clusters


def _distances(k: Tensor, centre: Tensor) -> Tensor:
    """Return the distance of every key to every centre; without a matrix product, so each is independent of other pairs."""
    return torch.cdist(k, centre, compute_mode="donot_use_mm_for_euclid_dist")
