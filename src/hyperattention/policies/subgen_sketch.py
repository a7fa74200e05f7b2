"""SubGen as published: attention from a sketch whose size grows with the number of clusters, not the number of keys."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.coreset import Coreset
from hyperattention.policies.online_clusters import Clusters, OnlineClusters
from hyperattention.policies.value_reservoir import Drawn, ValueReservoir
from hyperattention.types import Partial


@dataclass(frozen=True)
class SketchSizes:
    """The sizes of a sketch.

    Args:
        delta: largest distance of a key from the centre of its cluster.
        samples: number of keys drawn from each cluster, t.
        value_samples: number of pairs drawn for the numerator, s.
        most_clusters: largest number of clusters of a head; None for no limit.

    Raises:
        ValueError: if `delta` is negative or not finite, or a number is not positive.
    """

    delta: float
    samples: int
    value_samples: int
    most_clusters: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.delta) and self.delta >= 0):
            raise ValueError(f"delta={self.delta} must be a finite distance of at least 0: clusters have this radius")
        if min(self.samples, self.value_samples) < 1:
            raise ValueError(f"samples={self.samples}, value_samples={self.value_samples}: give at least 1 of each")
        if self.most_clusters is not None and self.most_clusters < 1:
            raise ValueError(f"most_clusters={self.most_clusters} must be at least 1, or None to fill the budget")

    def bounded(self, most: int) -> "SketchSizes":
        """Limit the number of clusters.

        Args:
            most: largest number of clusters of a head.

        Returns:
            the sizes with this limit.
        """
        return replace(self, most_clusters=most)

    def cluster_bytes(self, key_bytes: int) -> int:
        """Return the bytes of a cluster: its centre and samples, and eight bytes for each ticket and the count.

        Args:
            key_bytes: bytes of a key.

        Returns:
            the bytes.
        """
        return (self.samples + 1) * (key_bytes + 8)

    def reservoir_bytes(self, slot_bytes: int) -> int:
        """Return the bytes of a head's draws: keys and values, and eight bytes for each norm and time.

        Args:
            slot_bytes: bytes of a key and its value.

        Returns:
            the bytes.
        """
        return self.value_samples * (slot_bytes + 16)


class SubGenSketch:
    """Estimate attention over all absorbed keys: the numerator from a reservoir of pairs, the normaliser from clusters.

    z = sum over draws of total / (s ||v||^2) exp(scale q . k) v,   tau = sum_c n_c / t sum over samples of c of
    exp(scale q . k),   out = z / tau,   lse = log tau

    This is the published estimator; `ClusterCentres` is the practical variant with one weighted set of keys.

    Source: Zandieh et al., 2024 (arXiv:2402.06082), SubGen; later called ClusterGen.   Differs: only the source of random
    numbers (see `OnlineClusters` and `ValueReservoir`).
    Cost: m + s products per new token, m t + s per query, for m clusters, t samples of each and s draws, independent of the
    number of keys.
    Guarantee: z and tau are unbiased. If the keys lie in m balls of diameter delta, ||out - exact|| is at most epsilon
    ||softmax||_2 ||V||_op with high probability, for t of order exp(2 delta r) log(n) / epsilon^2, s of order head_dim /
    epsilon^2, and r a bound on scale ||q||. The weights of z need not sum to tau, so a row need not be an average of values.

    Args:
        sizes: delta, t and s.
        counters: seed and layer, which determine every draw.
    """

    def __init__(self, sizes: SketchSizes, *, counters: tuple[int, int] = (0, 0)) -> None:
        """Know no key."""
        self.sizes = sizes
        self._clusters = OnlineClusters(sizes.delta, sizes.samples, most=sizes.most_clusters, counters=counters)
        self._reservoir = ValueReservoir(sizes.value_samples, counters=counters)

    def absorb(
        self,
        k: Float[Tensor, "batch kv_heads new head_dim"],
        v: Float[Tensor, "batch kv_heads new value_dim"],
        position: Int[Tensor, " new"],
        live: Bool[Tensor, "batch new"],
    ) -> None:
        """Absorb keys and values; the result does not depend on how they are split into calls.

        Args:
            k: keys.
            v: their values.
            position: position of each key in the text, which determines its draws.
            live: False for padding, which is ignored.
        """
        self._clusters.absorb(k, position, live)
        self._reservoir.absorb(k, v, position, live)

    @property
    def held(self) -> tuple[Clusters, Drawn]:
        """Return the content of the sketch.

        Returns:
            the clusters, and the draws for the numerator.

        Raises:
            ValueError: if no key was absorbed yet.
        """
        if self._clusters.clusters is None or self._reservoir.drawn is None:
            raise ValueError("the sketch is empty: absorb keys and values first")
        return self._clusters.clusters, self._reservoir.drawn

    @property
    def num_clusters(self) -> Int[Tensor, "batch kv_heads"]:
        """Count the clusters of each head."""
        return self.held[0].num

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors, including space for more clusters."""
        return sum(x.numel() * x.element_size() for part in self.held for x in part.tensors)

    def take_rows(self, index: Int[Tensor, " rows"]) -> None:
        """Select rows of the batch.

        Args:
            index: the rows; repeats are allowed.
        """
        clusters, drawn = self.held
        self._clusters.clusters = Clusters(*(x.index_select(0, index.to(x.device)) for x in clusters.tensors))
        self._reservoir.drawn = Drawn(*(x.index_select(0, index.to(x.device)) for x in drawn.tensors))

    def restore(self, clusters: Clusters, drawn: Drawn) -> None:
        """Replace the content by that of another sketch.

        Args:
            clusters: clusters of the other sketch.
            drawn: draws of the other sketch.

        Raises:
            ValueError: if the shapes do not fit one another, or not the sizes of this sketch.
        """
        (batch, heads, room), samples = clusters.count.shape, self.sizes.samples
        slots = (batch, heads, self.sizes.value_samples)
        fits = (
            clusters.num.shape == drawn.total.shape == (batch, heads)
            and clusters.centre.shape[:3] == (batch, heads, room)
            and clusters.ticket.shape == clusters.sample.shape[:4] == (batch, heads, room, samples)
            and drawn.k.shape[:3] == drawn.v.shape[:3] == drawn.norm.shape == drawn.time.shape == slots
            and clusters.centre.shape[3] == clusters.sample.shape[4] == drawn.k.shape[3]
        )
        if not fits:
            shapes = [tuple(x.shape) for x in (*clusters.tensors, *drawn.tensors)]
            raise ValueError(f"a sketch of {self.sizes} cannot load tensors of shapes {shapes}: use their original sizes")
        self._clusters.clusters, self._reservoir.drawn = clusters, drawn

    def normaliser(self) -> Coreset:
        """Return the weighted keys whose sum is the normaliser: samples of every cluster, each with weight n_c / t.

        Returns:
            a coreset; its values have no meaning.
        """
        clusters, _ = self.held
        most, samples = int(clusters.num.max()) if clusters.num.numel() else 0, clusters.ticket.shape[3]
        k = clusters.sample.flatten(2, 3)[:, :, : most * samples]
        weight = (clusters.count[:, :, :most].double() / samples).log().to(torch.promote_types(k.dtype, torch.float32))
        return Coreset(k, k.new_zeros(1).expand(*k.shape[:3], 1), weight.repeat_interleave(samples, -1))

    def attend(
        self,
        q: Float[Tensor, "batch heads queries head_dim"],
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Partial:
        """Compute attention over all absorbed keys.

        Args:
            q: queries; query head h reads kv head h // (heads // kv_heads).
            scale: factor of the scores; 1 / sqrt(head_dim) if None.
            softcap: bound of the scores; None for no bound.

        Returns:
            z / tau and log tau, which merge with attention over other keys to (z + theirs) / (tau + theirs).
        """
        top = self.held[1].coreset.attend(q, scale=scale, softcap=softcap)
        lse = self.normaliser().attend(q, scale=scale, softcap=softcap).lse
        # a head that absorbed no key must not divide by 0
        ratio = (top.lse - lse).exp().masked_fill(lse == -torch.inf, 0.0)
        return Partial(top.out * ratio[..., None].to(top.out.dtype), lse)
