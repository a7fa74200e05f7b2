"""SubGen as a cache: a store that keeps a sketch of old tokens, and the latest tokens unchanged."""

from dataclasses import fields

import torch
from torch import Tensor

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.buffer import is_writable
from hyperattention.cache.fitting import fit_state, floating_type, insist
from hyperattention.cache.recent import Recent
from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.cache.store import Store
from hyperattention.merge import merge
from hyperattention.policies.online_clusters import Clusters
from hyperattention.policies.subgen_sketch import SketchSizes, SubGenSketch
from hyperattention.policies.value_reservoir import Drawn
from hyperattention.types import Partial

_RECENT = ("k", "v", "live")
_CLUSTERS, _DRAWN = (
    tuple(f"{part}_{each.name}" for each in fields(kind)) for part, kind in (("cluster", Clusters), ("drawn", Drawn))
)

# for each tensor of a state: its axes, and its dtype or the name of the tensor whose dtype it shares
_RECENT_KINDS = {
    "k": ("batch kv_heads tokens head_dim", "k"),
    "v": ("batch kv_heads tokens value_dim", "v"),
    "live": ("batch tokens", torch.bool),
    "numbers": ("1", torch.int64),
}
_KINDS = _RECENT_KINDS | {
    "cluster_centre": ("batch kv_heads clusters head_dim", "k"),
    "cluster_sample": ("batch kv_heads clusters samples head_dim", "k"),
    "cluster_ticket": ("batch kv_heads clusters samples", torch.float64),
    "cluster_count": ("batch kv_heads clusters", torch.int64),
    "cluster_num": ("batch kv_heads", torch.int64),
    "drawn_k": ("batch kv_heads slots head_dim", "k"),
    "drawn_v": ("batch kv_heads slots value_dim", "v"),
    "drawn_norm": ("batch kv_heads slots", torch.float64),
    "drawn_time": ("batch kv_heads slots", torch.float64),
    "drawn_total": ("batch kv_heads", torch.float64),
}


class SubGenStore(Store):
    """Keep the latest tokens unchanged, and let a sketch absorb older tokens, batch by batch.

    Up to `CacheBudget.budget` tokens no token is absorbed and attention is exact. Later, the window and up to
    `CacheBudget.pending` tokens that wait to be absorbed are exact; the sketch estimates attention over all others, and both
    are merged by their log-sum-exp. `CacheBudget.sinks` has no effect here: as in the paper, the first keys are clustered
    like all others.

    `append` returns the exact tokens only, because the sketch has no list of keys and values; `num_slots` counts the same
    tokens.

    Cost: one distance per token and centre; a query reads the exact tokens, `samples` keys of each cluster, and the draws.

    Args:
        sizes: sizes of the sketch.
        room: the budget; if `sizes` has no limit of clusters, the limit is what fits in the bytes of `budget` slots.
        layer: layer of the model, a counter of every draw.
        seed: seed of every draw.
    """

    def __init__(self, sizes: SketchSizes, room: CacheBudget, *, layer: int = 0, seed: int = 0) -> None:
        """Start empty."""
        self.sizes, self.room, self.layer, self.seed = sizes, room, layer, seed
        self.sketch: SubGenSketch | None = None
        self._recent = Recent()
        self._seen = self._new = 0

    @property
    def seen(self) -> int:
        """Tokens appended so far, padding included."""
        return self._seen

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self._recent.batch

    @property
    def device(self) -> torch.device | None:
        """Device of keys and values."""
        return self._recent.device

    @property
    def num_slots(self) -> int:
        """Number of exact tokens."""
        return self._recent.num

    @property
    def num_read(self) -> int:
        """Number of exact tokens, samples of every cluster, and draws."""
        if self.sketch is None:
            return self._recent.num
        return self._recent.num + int(self.sketch.num_clusters.max()) * self.sizes.samples + self.sizes.value_samples

    @property
    def is_whole(self) -> bool:
        """Whether no token was absorbed yet."""
        return self.sketch is None

    @property
    def memory_bytes(self) -> int:
        """Bytes of the exact tokens and of the sketch."""
        return self._recent.memory_bytes + (0 if self.sketch is None else self.sketch.memory_bytes)

    @property
    def _limit(self) -> int:
        """Number of tokens above which the oldest are absorbed."""
        return self.room.budget if self.is_whole else self.room.window + self.room.pending

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new tokens after the others."""
        self._recent.append(k, v, self._limit + 1)
        self._new = k.shape[2]
        self._seen += self._new
        return self._recent.tensors[:2]

    def mask_padding(self, live: Tensor) -> None:
        """Record the padding, which is never absorbed."""
        self._recent.mask_padding(live)

    def attend(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> Partial:
        """Compute attention over the exact tokens (causal among the newest) and over the sketch."""
        exact = self._recent.coreset.attend(q, scale=scale, own=self._new, softcap=rule.softcap)
        if self.sketch is None:
            return rule.drop_sinks(exact)
        return rule.drop_sinks(merge([exact, self.sketch.attend(q, scale=scale, softcap=rule.softcap)]))

    def end_step(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> None:
        """Absorb all tokens before the window, if there are more tokens than the limit."""
        if self._recent.num <= self._limit:
            return
        k, v, live = self._recent.tensors
        num, first = self._recent.num - self.room.window, self._seen - self._recent.num
        sketch = self._writable() or SubGenSketch(self._sizes(k, v), counters=(self.seed, self.layer))
        position = torch.arange(first, first + num, dtype=torch.int64, device=k.device)
        sketch.absorb(k[:, :, :num], v[:, :, :num], position, live[:, :num])
        self.sketch = sketch
        self._recent.drop(num, self._limit + 1)

    def _writable(self) -> SubGenSketch | None:
        """Copy a sketch whose tensors were made in inference mode, if inference mode is off now."""
        if self.sketch is not None and not all(is_writable(x) for part in self.sketch.held for x in part.tensors):
            clusters, drawn = self.sketch.held
            self.sketch.restore(Clusters(*(x.clone() for x in clusters.tensors)), Drawn(*(x.clone() for x in drawn.tensors)))
        return self.sketch

    def _sizes(self, k: Tensor, v: Tensor) -> SketchSizes:
        """Limit the clusters to the remaining budget, if no other limit is given."""
        if self.sizes.most_clusters is not None:
            return self.sizes
        slots = self.room.budget - self.room.window - self.room.pending
        slot = k.shape[3] * k.element_size() + v.shape[3] * v.element_size()
        left = slots * slot - self.sizes.reservoir_bytes(slot)
        most = left // self.sizes.cluster_bytes(k.shape[3] * k.element_size())
        if most < 1:
            raise ValueError(
                f"budget={self.room.budget} leaves no space for clusters of samples={self.sizes.samples} keys besides a "
                f"window of {self.room.window} and value_samples={self.sizes.value_samples}: give a larger budget, fewer "
                "samples, or most_clusters="
            )
        return self.sizes.bounded(most)

    def take_rows(self, index: Tensor) -> None:
        """Select batch rows of all tensors."""
        self._recent.take_rows(index)
        if self.sketch is not None:
            self.sketch.take_rows(index)

    def crop(self, num: int) -> None:
        """Remove latest tokens that are not absorbed yet."""
        if num > self._recent.num:
            raise ValueError(
                f"cannot forget the latest {num} tokens: all but the last {self._recent.num} were absorbed into the sketch; "
                f"give a window of at least {num}"
            )
        self._recent.crop(num)
        self._seen, self._new = self._seen - num, 0

    def state(self) -> dict[str, Tensor]:
        """Copy the exact tokens, the sketch and the counters."""
        state = dict(zip(_RECENT, self._recent.tensors, strict=True)) if self._recent.batch else {}
        if self.sketch is not None:
            clusters, drawn = self.sketch.held
            state |= dict(zip(_CLUSTERS, clusters.tensors, strict=True)) | dict(zip(_DRAWN, drawn.tensors, strict=True))
        copied = {name: x.clone(memory_format=torch.contiguous_format) for name, x in state.items()}
        return copied | {"numbers": torch.tensor([self._seen], dtype=torch.int64, device="cpu")}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Replace tokens, sketch and counters."""
        absorbed = any(name in state for name in (*_CLUSTERS, *_DRAWN))
        self._check(state, absorbed)
        k, v, live = (state[name] for name in _RECENT)
        sketch = None
        if absorbed:
            clusters, drawn = Clusters(*(state[name] for name in _CLUSTERS)), Drawn(*(state[name] for name in _DRAWN))
            sketch = SubGenSketch(self._sizes(k, v), counters=(self.seed, self.layer))
            sketch.restore(clusters, drawn)
        self._recent.restore(k, v, live)
        self.sketch, self._seen, self._new = sketch, int(state["numbers"][0]), 0

    def _check(self, state: dict[str, Tensor], absorbed: bool) -> None:
        """Check that a store of this budget can have this state; the sketch checks its own sizes."""
        held = _KINDS if absorbed else _RECENT_KINDS
        types = {name: floating_type(state, name) for name in ("k", "v")}
        kinds = {name: (axes, types[kind] if isinstance(kind, str) else kind) for name, (axes, kind) in held.items()}
        fit_state(state, kinds)
        recent, seen = state["k"].shape[2], int(state["numbers"][0])
        most = self.room.window + self.room.pending if absorbed else self.room.budget
        insist(
            recent <= min(most, seen) and (absorbed or recent == seen),
            f"{recent} of {seen} tokens are exact, at most {most}",
        )
        if not absorbed:
            return
        count, num = state["cluster_count"], state["cluster_num"]
        insist(((num >= 0) & (num <= count.shape[2])).all(), f"there are from 0 to {count.shape[2]} clusters")
        insist(
            (count >= 0).all() & (count.sum(-1) <= seen - recent).all(),
            f"clusters count the {seen - recent} tokens absorbed",
        )
        for name in ("cluster_ticket", "drawn_time", "drawn_norm", "drawn_total"):
            insist((state[name] >= 0).all(), f"{name} is not negative")
        for name in ("drawn_norm", "drawn_total"):
            insist(state[name].isfinite().all(), f"{name} is finite")
