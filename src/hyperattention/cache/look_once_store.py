"""A store by pages that drops, once, the keys of a prompt which its last queries attend to least."""

from collections.abc import Callable

import torch
from torch import Tensor

from hyperattention.cache.selecting import SelectingStore
from hyperattention.cache.store import Store
from hyperattention.condense.attended import attended
from hyperattention.condense.held import Held
from hyperattention.types import Partial


class LookOnceStore(Store):
    """Hold all keys of a prompt until the first step that chooses pages has ended, then a share of them and all that follow.

    What is left lies in order in a store by pages, which answers every step; that its tokens are not consecutive means
    nothing to it. Sinks, window and the step at hand are never dropped; guesses of assisted decoding vote if they are in it.

    Args:
        make: makes an empty store by pages.
        keep: share of the tokens that stays, but never fewer than the budget.
        latest: queries that vote.
    """

    def __init__(self, make: Callable[[], SelectingStore], *, keep: float, latest: int) -> None:
        """Hold nothing."""
        self.keep, self.latest = keep, latest
        self._make, self.pages = make, make()
        self._queries: Tensor | None = None
        self._begin: Tensor | None = None
        # keys and values of all slots, while a step lasts
        self._shown: tuple[Tensor, Tensor] | None = None
        self._gone = self._fixed = self._new = 0
        self._looked = False

    @property
    def seen(self) -> int:
        """Tokens appended so far, padding and what was dropped included."""
        return self.pages.seen + self._gone

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.pages.batch

    @property
    def num_slots(self) -> int:
        """All keys that are left are shown."""
        return self.pages.num_slots

    @property
    def is_whole(self) -> bool:
        """Whether nothing was dropped, and the step at hand reads every key."""
        return not self._gone and self.pages.is_whole

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys, values and summaries, and of the queries kept until they have voted."""
        queries = 0 if self._queries is None else self._queries.numel() * self._queries.element_size()
        return self.pages.memory_bytes + queries

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys behind the others."""
        if self._begin is None:
            self._begin = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
        self._new, self._shown = k.shape[2], self.pages.append(k, v)
        return self._shown

    def mark(self, live: Tensor) -> None:
        """Note where each row begins."""
        self.pages.mark(live)
        if self._begin is not None:
            self._begin = self._begin + (~live).sum(-1)

    @property
    def _held(self) -> Held:
        """Show all slots of the step at hand, those of padding empty."""
        if self._shown is None or self._begin is None:
            raise ValueError("nothing was appended in this step: append keys and values first")
        k, v = self._shown
        place = torch.arange(k.shape[2], device=k.device)
        weight = torch.zeros(k.shape[:3], dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
        weight.masked_fill_((place < self._begin[:, None])[:, None], -torch.inf)
        return Held(k, v, weight, place.expand(weight.shape), torch.zeros_like(weight))

    def attend(self, q: Tensor, scale: float) -> Partial:
        """Attend to sinks, window and the best pages; a long step to all that is left."""
        if self.pages.is_whole:
            return self._held.coreset.attend(q, scale=scale, own=self._new)
        return self.pages.attend(q, scale)

    def settle(self, q: Tensor, scale: float) -> None:
        """Sum up pages; keep the latest queries, and let them vote after the first step that chose."""
        self.pages.settle(q, scale)
        if not self._looked:
            q = q * scale
            kept = q if self._queries is None else torch.cat([self._queries, q], 2)
            self._queries = kept[:, :, -self.latest :].clone()
            if not self.pages.is_whole:
                self._look(self._queries)
        self._shown = None

    def _look(self, queries: Tensor) -> None:
        """Keep what the queries attend to most, in order, and read by pages from there."""
        held, room = self._held, self.pages.room
        num, place, begin = held.num_slots, held.position, self._begin_of_heads
        # all tokens of the step stay: they may be guesses, to be taken back
        recent = max(room.window, self._new)
        count = min(num, max(room.budget, round(self.keep * num), room.sinks + recent))
        score = attended(held, queries, 1.0)
        score.masked_fill_((place < begin + room.sinks) | (place >= num - recent), torch.inf)
        # padding goes first; where there is too little else it stays, and it stands in front
        score.masked_fill_(~held.live, -1.0)
        index = score.topk(count, -1).indices.sort(-1).values
        left = held.take(index, held.log_weight.gather(2, index))
        pages = self._make()
        pages.append(left.k, left.v)
        pages.mark(left.live[:, 0])
        pages.settle(queries, 1.0)
        self.pages, self._begin = pages, (~left.live[:, 0]).sum(-1)
        self._gone, self._fixed = num - count, count - recent
        self._looked, self._queries = True, None

    @property
    def _begin_of_heads(self) -> Tensor:
        if self._begin is None:
            raise ValueError("nothing is held yet: append keys and values first")
        return self._begin[:, None, None]

    def take_rows(self, index: Tensor) -> None:
        """Copy rows of everything."""
        self.pages.take_rows(index)
        self._begin, self._queries = (
            None if x is None else x.index_select(0, index.to(x.device)) for x in (self._begin, self._queries)
        )

    def crop(self, num: int) -> None:
        """Forget tokens that came after the eviction, or were in the window then."""
        if self._gone and num > self.pages.seen - self._fixed:
            raise ValueError(
                f"cannot forget the latest {num} tokens: of all but the last {self.pages.seen - self._fixed} some were "
                f"dropped after the prompt; give a window of at least {num}"
            )
        self.pages.crop(num)
        self._new, self._shown = 0, None
        if self._queries is not None:
            self._queries = self._queries[:, :, : max(0, self._queries.shape[2] - num)]

    def state(self) -> dict[str, Tensor]:
        """Copy what is left, the queries that have yet to vote, and the counters."""
        queries = {} if self._queries is None else {"queries": self._queries.contiguous()}
        return self.pages.state() | queries | {"numbers": torch.tensor([self._gone, self._fixed, int(self._looked)])}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take keys, values, queries and counters over."""
        needed = ("numbers",) if "numbers" not in state or state["numbers"][2] else ("queries",)
        if missing := [name for name in needed if name not in state]:
            raise ValueError(f"the state of a layer lacks {missing}: it is not whole")
        # so that a state that is refused leaves this store as it was
        pages = self._make()
        pages.restore(state)
        self.pages, self._begin, self._queries = pages, state["begin"], state.get("queries")
        self._gone, self._fixed, looked = (int(x) for x in state["numbers"])
        self._looked, self._new, self._shown = bool(looked), 0, None
