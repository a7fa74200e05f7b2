"""A store within a budget: attention sinks, compressed keys and the latest keys, in one buffer."""

import torch
from torch import Tensor

from hyperattention.cache.attended import attended
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.buffer import is_writable
from hyperattention.cache.fitting import fit_new, fit_state, floating_type, insist
from hyperattention.cache.policy import CompressionRequest, Policy
from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.cache.slots import CacheSlots, joined, live_first
from hyperattention.cache.store import Store
from hyperattention.types import Partial

_NAMES = ("k", "v", "log_weight", "position", "score")
# latest queries whose attention is counted only in the next step, so that rejected tokens of assisted decoding leave no
# trace
_REVOCABLE = 32


class CompressingStore(Store):
    """Hold at most a budget of slots: if there are more, a policy compresses the slots between sinks and window.

    Slots are in the order of their positions: sinks, compressed keys, latest keys. New tokens are written at the end, into
    free slots. If the budget is exceeded, one compression frees slots for the next `CacheBudget.pending` tokens.

    Cost: O(1) copies per token, and the policy's work once per `CacheBudget.pending` tokens.

    Args:
        policy: the policy that compresses.
        room: the budget.
        layer: layer of the model, a counter of every draw.
        seed: seed of every draw.
    """

    def __init__(self, policy: Policy, room: CacheBudget, *, layer: int = 0, seed: int = 0) -> None:
        """Start empty."""
        self.policy, self.room, self.layer, self.seed = policy, room, layer, seed
        self._buffer: CacheSlots | None = None
        self._queries: Tensor | None = None
        self._waiting: tuple[Tensor, float, ScoreRule] | None = None
        self._count = self._seen = self._turn = self._new = 0
        # free slots before this one were in use: what they hold is not that of a new token
        self._used = 0

    @property
    def seen(self) -> int:
        """Tokens appended so far, padding included."""
        return self._seen

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return 0 if self._buffer is None else self._buffer.k.shape[0]

    @property
    def device(self) -> torch.device | None:
        """Device of keys and values."""
        return None if self._buffer is None else self._buffer.k.device

    @property
    def num_slots(self) -> int:
        """Slots in use."""
        return self._count

    @property
    def num_read(self) -> int:
        """All slots."""
        return self._count

    @property
    def is_whole(self) -> bool:
        """Whether no key was compressed yet."""
        return self._turn == 0

    @property
    def memory_bytes(self) -> int:
        """Bytes of the buffer and of the stored queries."""
        queries = [x for x in (self._queries, self._waiting and self._waiting[0]) if x is not None]
        return sum(x.numel() * x.element_size() for x in queries) + (
            0 if self._buffer is None else self._buffer.memory_bytes
        )

    @property
    def held(self) -> CacheSlots:
        """Return all slots in use, as views.

        Returns:
            the slots.

        Raises:
            ValueError: if no key was appended yet.
        """
        if self._buffer is None:
            raise ValueError("the cache is empty: append keys and values first")
        return self._buffer.part(0, self._count)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys after the others."""
        if self._buffer is not None:
            fit_new((k, v), (self._buffer.k, self._buffer.v))
        self._watch_waiting()
        new, end = k.shape[2], self._count + k.shape[2]
        buffer = self._grown(k, v, end)
        buffer.k[:, :, self._count : end].copy_(k)
        buffer.v[:, :, self._count : end].copy_(v)
        if self._count < self._used:
            for x in (buffer.log_weight, buffer.score):
                x[:, :, self._count : end].zero_()
        self._buffer, self._count, self._seen, self._new = buffer, end, self._seen + new, new
        held = self.held
        return held.k, held.v

    def _grown(self, k: Tensor, v: Tensor, count: int) -> CacheSlots:
        """Enlarge the buffer to `count` slots: first to the size needed, later by half, or to the budget."""
        old = self._buffer
        have = 0 if old is None else old.num_slots
        if old is not None and count <= have and is_writable(old.k):
            return old
        most = self.room.budget + 1
        room = count if count >= most else most if not self.is_whole else min(most, max(count, 3 * have // 2))
        k, v = (x.new_empty((*x.shape[:2], room, x.shape[3])) for x in (k, v))
        fresh = CacheSlots(k, v, *_of_new_tokens(k, self._seen - self._count))
        if old is not None:
            for to, source in zip(fresh.tensors, old.tensors, strict=True):
                to[:, :, : self._count] = source[:, :, : self._count]
        self._used = 0
        return fresh

    def mask_padding(self, live: Tensor) -> None:
        """Empty the slots of padding."""
        if self._buffer is not None and not bool(live.all()):
            new = self.held.part(self._count - self._new, self._count)
            new.log_weight.masked_fill_(~live[:, None], -torch.inf)
            # so that no previous content can reach a sum
            for x in (new.k, new.v):
                x.masked_fill_(~live[:, None, :, None], 0.0)

    def attend(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> Partial:
        """Compute attention over all slots, causal among the newest."""
        return self.held.coreset.attend(q, scale=scale, own=self._new, softcap=rule.softcap, sinks=rule.sinks)

    def end_step(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> None:
        """Count the attention of the queries, and compress if the budget is exceeded."""
        full = self._count > self.room.budget
        if self.policy.num_queries or self.policy.watches:
            waiting = 0 if full else min(_REVOCABLE, q.shape[2])
            known, rest = q.detach().split([q.shape[2] - waiting, waiting], 2)
            self._watch(known, scale, rule, self._count - waiting)
            self._waiting = (rest.clone(), scale, rule)
        if full:
            self._compress(scale, rule)

    def _watch_waiting(self) -> None:
        """Count the attention of the latest queries: their tokens can no longer be removed."""
        if self._waiting is not None:
            self._watch(*self._waiting, self._count)
            self._waiting = None

    def _watch(self, q: Tensor, scale: float, rule: ScoreRule, end: int) -> None:
        """Store queries, the last of which belongs to the slot before `end`, and count the attention they give."""
        num = self.policy.num_queries
        if num and self._queries is None:
            self._queries = q[:, :, -num:].clone()
        elif num and self._queries is not None and q.shape[2]:
            before = self._queries[:, :, max(0, self._queries.shape[2] + q.shape[2] - num) :]
            self._queries = torch.cat([before, q[:, :, -num:]], 2)
        if self.policy.watches and q.shape[2]:
            held = self.held.part(0, end)
            held.score.add_(attended(held, q, scale, rule))

    def _compress(self, scale: float, rule: ScoreRule) -> None:
        held, begin, end = self.held, self.room.sinks, self._count - self.room.window
        # at the first compression, and later if a row had fewer keys than sinks
        if self.is_whole or not bool(held.live[:, :, :begin].all()):
            held = live_first(held, end)
        queries = self._queries
        if queries is None:
            queries = held.k.new_zeros((held.k.shape[0], held.k.shape[1], 0, held.k.shape[3]))
        full = CompressionRequest(
            held, begin, end, self.room.middle, queries, scale, (self.seed, self.layer, self._turn), rule
        )
        parts = (held.part(0, begin), self.policy.compress(full), held.part(end, self._count))
        self._turn += 1
        self._count = sum(part.num_slots for part in parts)
        # the free slots are part of the budget; one more slot holds the token that exceeds it
        spare = self.room.budget + 1 - self._count
        k, v = (x[:, :, :1].expand(-1, -1, spare, -1) for x in (held.k, held.v))
        self._buffer, self._used = joined((*parts, CacheSlots(k, v, *_of_new_tokens(k, self._seen)))), 0

    def take_rows(self, index: Tensor) -> None:
        """Select batch rows of all tensors."""
        if self._buffer is not None:
            self._buffer = self._buffer.rows(index)
        if self._queries is not None:
            self._queries = self._queries.index_select(0, index.to(self._queries.device))
        if self._waiting is not None:
            q, scale, rule = self._waiting
            self._waiting = (q.index_select(0, index.to(q.device)), scale, rule)

    def crop(self, num: int) -> None:
        """Remove latest tokens that are not compressed: those in the window or after it."""
        recent = self._count if self.is_whole else self._count - self.room.sinks - self.room.middle
        if num > recent:
            why = f"all but the last {recent} were compressed by {self.policy!r}; give a window of at least {num}"
            fewer = f"only {recent} were read; give at most as many"
            raise ValueError(f"cannot forget the latest {num} tokens: {fewer if self.is_whole else why}")
        self._used = max(self._used, self._count)
        self._count, self._seen, self._new = self._count - num, self._seen - num, 0
        if self._waiting is not None:
            q, scale, rule = self._waiting
            self._waiting = (q[:, :, : max(0, q.shape[2] - num)], scale, rule)
            num = max(0, num - q.shape[2])
        if self._queries is not None:
            self._queries = self._queries[:, :, : max(0, self._queries.shape[2] - num)]

    def state(self) -> dict[str, Tensor]:
        """Copy slots and counters; the attention of the latest queries is counted first, even if they are cropped later."""
        self._watch_waiting()
        state = dict(zip(_NAMES, self.held.tensors, strict=True)) | {
            "numbers": torch.tensor([self._seen, self._turn], dtype=torch.int64, device="cpu")
        }
        state |= {} if self._queries is None else {"queries": self._queries}
        return {name: x.clone(memory_format=torch.contiguous_format) for name, x in state.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Replace slots and counters by those of a state."""
        self._check(state)
        self._seen, self._turn = (int(x) for x in state["numbers"])
        self._buffer, self._queries, self._waiting = (
            CacheSlots(*(state[name] for name in _NAMES)),
            state.get("queries"),
            None,
        )
        self._count, self._new, self._used = self._buffer.num_slots, 0, 0

    def _check(self, state: dict[str, Tensor]) -> None:
        """Check that a store of this policy and budget can have this state."""
        of_k, of_v, slot = floating_type(state), floating_type(state, "v"), "batch kv_heads slots"
        weight = torch.promote_types(of_k, torch.float32)
        wanted = {"k": (f"{slot} head_dim", of_k), "v": (f"{slot} value_dim", of_v), "numbers": ("2", torch.int64)}
        wanted |= {"log_weight": (slot, weight), "position": (slot, torch.int32), "score": (slot, weight)}
        # a policy that reads queries has received some before any state is saved
        if self.policy.num_queries:
            wanted["queries"] = ("batch heads latest head_dim", floating_type(state, "queries"))
        size = fit_state(state, wanted)
        (seen, turn), slots, budget = (int(x) for x in state["numbers"]), size["slots"], self.room.budget
        least = seen if turn == 0 else self.room.sinks + self.room.middle
        insist(turn >= 0 and least <= slots <= min(seen, budget), f"{slots} slots of {seen} tokens, budget={budget}")
        insist(size.get("latest", 0) <= self.policy.num_queries, f"at most {self.policy.num_queries} queries are kept")
        insist(size.get("heads", 0) % max(1, size["kv_heads"]) == 0, "heads of queries are a multiple of the kv heads")
        position, score = state["position"], state["score"]
        insist((state["log_weight"] < torch.inf).all(), "log-weights are numbers below infinity")
        insist(((position >= 0) & (position < seen)).all(), f"positions lie from 0 to {seen - 1}")
        insist(((score >= 0) & (score < torch.inf)).all(), "attention that keys got is finite and not negative")


def _of_new_tokens(k: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make log-weights, positions and scores of slots for new tokens, the position of the first slot given."""
    shape, dtype = k.shape[:3], torch.promote_types(k.dtype, torch.float32)
    position = torch.arange(first, first + shape[2], dtype=torch.int32, device=k.device).expand(shape)
    weight, score = (torch.zeros(shape, dtype=dtype, device=k.device) for _ in range(2))
    return weight, position.contiguous(), score
