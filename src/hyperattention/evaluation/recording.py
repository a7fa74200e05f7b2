"""A prompt that is read once for all policies: the keys, values and queries of every layer under exact attention."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hyperattention.cache.attended import attended
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.compressing import CompressingStore
from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.cache.slots import CacheSlots
from hyperattention.cache.store import Store, StoreFactory
from hyperattention.coreset import Coreset
from hyperattention.integrations.transformers.cache import HyperCache
from hyperattention.integrations.transformers.cache_layer import HyperCacheLayer
from hyperattention.types import Partial

# a recording is never full
_BOUNDLESS = 2**62


class RecordingStore(Store):
    """A store of all keys, values and queries, which are the inputs of every policy."""

    def __init__(self) -> None:
        """Make an empty store."""
        self._steps: list[tuple[Tensor, Tensor]] = []
        self._queries: list[Tensor] = []
        self._watched: dict[int, Tensor] = {}
        self.scale, self.rule = 1.0, PLAIN

    @property
    def k(self) -> Tensor:
        """All keys."""
        return self._joined()[0]

    @property
    def v(self) -> Tensor:
        """All values."""
        return self._joined()[1]

    @property
    def q(self) -> Tensor:
        """All queries."""
        self._queries = [torch.cat(self._queries, 2)] if len(self._queries) > 1 else self._queries
        return self._queries[0]

    def watched(self, queries: int) -> Tensor:
        """Sum the attention weights of the first queries on each key, as `CompressingStore` does; results are stored.

        Args:
            queries: number of queries.

        Returns:
            the sums for the same number of keys, ``[batch, kv_heads, queries]``.
        """
        if queries not in self._watched:
            before = max((number for number in self._watched if number < queries), default=0)
            k, v, q = self.k[:, :, :queries], self.v[:, :, :queries], self.q[:, :, before:queries]
            weight = torch.zeros(k.shape[:3], dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
            # attention weights do not depend on positions and scores of the slots, so these are zero
            total = attended(CacheSlots(k, v, weight, weight.int(), weight), q, self.scale, self.rule)
            if before:
                total[:, :, :before] += self._watched[before]
            self._watched[queries] = total
        return self._watched[queries]

    def _joined(self) -> tuple[Tensor, Tensor]:
        if len(self._steps) > 1:
            k, v = (torch.cat(parts, 2) for parts in zip(*self._steps, strict=True))
            self._steps = [(k, v)]
        return self._steps[0]

    @property
    def seen(self) -> int:
        """The number of tokens appended so far."""
        return sum(k.shape[2] for k, _ in self._steps)

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self._steps[0][0].shape[0] if self._steps else 0

    @property
    def device(self) -> torch.device | None:
        """The device of keys and values."""
        return self._steps[0][0].device if self._steps else None

    @property
    def num_slots(self) -> int:
        """The number of all tokens."""
        return self.seen

    @property
    def num_read(self) -> int:
        """The number of all tokens."""
        return self.seen

    @property
    def is_whole(self) -> bool:
        """True: the store never drops a key."""
        return True

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys, values and queries."""
        tensors = (*(x for step in self._steps for x in step), *self._queries)
        return sum(x.numel() * x.element_size() for x in tensors)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values."""
        self._steps.append((k, v))
        return self._joined()

    def mask_padding(self, live: Tensor) -> None:
        """Raise an error for padding, because prompts that are read together must have the same length."""
        if not bool(live.all()):
            raise ValueError("a prompt with padding cannot be recorded: read prompts of one length together")

    def attend(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> Partial:
        """Attend to all keys."""
        return rule.drop_sinks(Coreset.of(*self._joined()).attend(q, scale=scale, own=q.shape[2], softcap=rule.softcap))

    def end_step(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> None:
        """Store the queries."""
        self.scale, self.rule = scale, rule
        self._queries.append(q)

    def take_rows(self, index: Tensor) -> None:
        """Keep some rows of the batch."""
        if self._steps:
            k, v, q = (x.index_select(0, index.to(x.device)) for x in (self.k, self.v, self.q))
            self._steps, self._queries = [(k, v)], [q]
            self._watched = {n: x.index_select(0, index.to(x.device)) for n, x in self._watched.items()}

    def rows(self, index: Tensor) -> "RecordingStore":
        """Copy some rows of the batch into a new store.

        Args:
            index: the numbers of the rows; a row may occur more than once.

        Returns:
            the new store.
        """
        other = copy.copy(self)
        other.take_rows(index)
        return other

    def crop(self, num: int) -> None:
        """Remove the latest tokens."""
        if num:
            self._steps = [(self.k[:, :, :-num], self.v[:, :, :-num])]
            self._queries, self._watched = [self.q[:, :, :-num]], {}

    def state(self) -> dict[str, Tensor]:
        """Return all tensors."""
        return {"k": self.k, "v": self.v, "q": self.q, "scale": torch.tensor(self.scale, dtype=torch.float32, device="cpu")}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore a result of `state`."""
        if missing := sorted({"k", "v", "q", "scale"} - state.keys()):
            raise ValueError(f"the state of a recording lacks {missing}: give the complete result of `state`")
        self._steps, self._queries, self._watched = [(state["k"], state["v"])], [state["q"]], {}
        self.scale = float(state["scale"])


@dataclass(frozen=True)
class Recording(StoreFactory):
    """A factory of stores that keep all keys, values and queries."""

    def store(self, room: CacheBudget, layer: int, seed: int, previous: Store | None) -> Store:
        """Make an empty store; the budget is not used."""
        return RecordingStore()


def fill(cache: HyperCache, recorded: HyperCache) -> None:
    """Fill an empty cache with a recorded prompt, with the same result as a run of the model.

    Args:
        cache: the empty cache, which compresses the prompt if its budget is exceeded.
        recorded: the prompt, in a cache of `Recording`.
    """
    for number, (own, read) in enumerate(zip(cache.layers, recorded.layers, strict=True)):
        if isinstance(own, HyperCacheLayer) and isinstance(read, HyperCacheLayer) and isinstance(read.store, RecordingStore):
            own.lazy_initialization(read.store.k, read.store.v)
            own.store.append(read.store.k, read.store.v)
            _end_step(own.store, read.store)
        else:
            # layers with sliding windows keep transformers' own cache, the same for every policy
            cache.layers[number] = copy.deepcopy(read)


def _end_step(store: Store, read: RecordingStore) -> None:
    if not isinstance(store, CompressingStore):
        store.end_step(read.q, read.scale, read.rule)
        return
    # the attention sums of earlier queries are the same at every budget and in every copy of a prompt
    last = max(1, store.policy.num_queries)
    if store.policy.watches and read.seen > last:
        store.held.score[:, :, : read.seen - last].add_(read.watched(read.seen - last))
    store.end_step(read.q[:, :, -last:], read.scale, read.rule)


def start(model: PreTrainedModel) -> HyperCache:
    """Make an empty recording.

    Args:
        model: the model that will read the prompt.

    Returns:
        the recording, a cache for running the model.
    """
    return HyperCache(model.config, budget=_BOUNDLESS, policy=Recording())


def rows_of(recorded: HyperCache, model: PreTrainedModel, rows: Sequence[int]) -> HyperCache:
    """Copy some rows of a recording.

    Args:
        recorded: the prompts, one in each row.
        model: the model that read the prompts.
        rows: the numbers of the rows; a row may occur more than once.

    Returns:
        a new recording.

    Raises:
        ValueError: if a layer stores other state than keys and values.
    """
    index, copied = torch.tensor(rows, dtype=torch.int64, device="cpu"), start(model)
    for number, (old, new) in enumerate(zip(recorded.layers, copied.layers, strict=True)):
        if isinstance(old, HyperCacheLayer) and isinstance(new, HyperCacheLayer) and isinstance(old.store, RecordingStore):
            new.store = new.inner = old.store.rows(index)
            new.lazy_initialization(old.store.k, old.store.v)
        elif isinstance(old, DynamicLayer):
            copied.layers[number] = own = copy.deepcopy(old)
            own.batch_select_indices(index)
        else:
            raise ValueError(
                f"layer {number} keeps a {type(old).__name__}, whose rows cannot be repeated: evaluate a model whose layers "
                "all have attention"
            )
    return copied
