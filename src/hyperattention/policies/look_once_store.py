"""A store with pages that drops the keys of a prompt which its last queries attend to least."""

from collections.abc import Callable

import torch
from torch import Tensor

from hyperattention.cache.attended import attended
from hyperattention.cache.fitting import fit_state, insist
from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.cache.selecting import SelectingStore
from hyperattention.cache.slots import CacheSlots
from hyperattention.cache.store import Store
from hyperattention.types import Partial


class LookOnceStore(Store):
    """Hold a share of the tokens of a prompt, and all tokens after the prompt.

    The kept tokens are in order in a store with pages, which computes every step; it does not need consecutive tokens. A
    step too long to choose pages is a prompt, or a chunk of one: it reads all kept keys, and if these exceed the budget,
    some are dropped after the step. Sinks and window are never dropped.

    Args:
        make: makes an empty store with pages.
        keep: share of the tokens to keep, but never fewer than the budget.
        latest: number of last queries whose attention counts.
    """

    def __init__(self, make: Callable[[], SelectingStore], *, keep: float, latest: int) -> None:
        """Start empty."""
        self.keep, self.latest = keep, latest
        self._make, self.pages = make, make()
        self._begin: Tensor | None = None
        # keys and values of all slots, during a step
        self._shown: tuple[Tensor, Tensor] | None = None
        self._gone = self._fixed = self._new = 0

    @property
    def seen(self) -> int:
        """Tokens appended so far, including padding and dropped tokens."""
        return self.pages.seen + self._gone

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.pages.batch

    @property
    def device(self) -> torch.device | None:
        """Device of keys and values."""
        return self.pages.device

    @property
    def num_slots(self) -> int:
        """Number of kept keys."""
        return self.pages.num_slots

    @property
    def num_read(self) -> int:
        """Number of keys that the store with pages reads."""
        return self.pages.num_read

    @property
    def is_whole(self) -> bool:
        """Whether no key was dropped, and the current step reads every key."""
        return not self._gone and self.pages.is_whole

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys, values and summaries."""
        return self.pages.memory_bytes

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys after the others."""
        if self._begin is None:
            self._begin = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
        self._new, self._shown = k.shape[2], self.pages.append(k, v)
        return self._shown

    def mask_padding(self, live: Tensor) -> None:
        """Record where each row begins."""
        self.pages.mask_padding(live)
        self._begin = self._start + (~live).sum(-1)

    @property
    def _start(self) -> Tensor:
        if self._begin is None:
            raise ValueError("the cache is empty: append keys and values first")
        return self._begin

    @property
    def _held(self) -> CacheSlots:
        """Return all slots of the current step, with padding as empty slots."""
        if self._shown is None:
            raise ValueError("nothing was appended in this step: append keys and values first")
        k, v = self._shown
        place = torch.arange(k.shape[2], dtype=torch.int64, device=k.device)
        weight = torch.zeros(k.shape[:3], dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
        weight.masked_fill_((place < self._start[:, None])[:, None], -torch.inf)
        return CacheSlots(k, v, weight, place.expand(weight.shape), torch.zeros_like(weight))

    def attend(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> Partial:
        """Compute attention over sinks, window and the best pages; over all kept keys in a long step."""
        if self.pages.is_whole:
            return rule.drop_sinks(self._held.coreset.attend(q, scale=scale, own=self._new, softcap=rule.softcap))
        return self.pages.attend(q, scale, rule)

    def end_step(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> None:
        """Evict keys by the last queries of a prompt, or summarise the pages that are full now."""
        if self._new > self.pages.most_queries and self.pages.seen > self.pages.room.budget:
            self._look(q[:, :, -self.latest :], scale, rule)
        else:
            self.pages.end_step(q, scale, rule)
        self._shown = None

    def _look(self, queries: Tensor, scale: float, rule: ScoreRule) -> None:
        """Keep the keys that the queries attend to most, in order, and read them by pages from now on."""
        held, room = self._held, self.pages.room
        num, place = held.num_slots, held.position
        count = min(num, max(room.budget, round(self.keep * self.seen)))
        score = attended(held, queries, scale, rule)
        sunk = place < self._start[:, None, None] + room.sinks
        score.masked_fill_(sunk | (place >= num - room.window), torch.inf)
        # padding is dropped first; it is kept only if there are too few tokens, and then stays in front
        score.masked_fill_(~held.live, -1.0)
        index = score.topk(count, -1).indices.sort(-1).values
        left = held.take(index, held.log_weight.gather(2, index))
        # all heads of a row keep the same amount of padding
        live = left.live[:, 0]
        pages = self._make()
        pages.append(left.k, left.v)
        pages.mask_padding(live)
        pages.end_step(queries, scale)
        self.pages, self._begin = pages, (~live).sum(-1)
        self._gone, self._fixed = self._gone + num - count, count - room.window

    def take_rows(self, index: Tensor) -> None:
        """Select batch rows of all tensors."""
        self.pages.take_rows(index)
        self._begin = None if self._begin is None else self._begin.index_select(0, index.to(self._begin.device))

    def crop(self, num: int) -> None:
        """Remove tokens after the prompt, or in the window at the end of the prompt."""
        if self._gone and num > self.pages.seen - self._fixed:
            raise ValueError(
                f"cannot forget the latest {num} tokens: of all but the last {self.pages.seen - self._fixed} some were "
                f"dropped after the prompt; give a window of at least {num}"
            )
        self.pages.crop(num)
        self._new, self._shown = 0, None

    def state(self) -> dict[str, Tensor]:
        """Copy the kept keys and values, and the counters."""
        return self.pages.state() | {"numbers": torch.tensor([self._gone, self._fixed], dtype=torch.int64, device="cpu")}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Replace keys, values and counters."""
        others = {name: x for name, x in state.items() if name != "numbers"}
        fit_state({name: x for name, x in state.items() if name not in others}, {"numbers": ("2", torch.int64)})
        gone, fixed = (int(x) for x in state["numbers"])
        # so that a refused state leaves this store unchanged
        pages = self._make()
        pages.restore(others)
        insist(gone >= 0 <= fixed and (not gone or fixed <= pages.seen), f"of {pages.seen} slots {fixed} were kept")
        self.pages, self._begin = pages, state["begin"]
        self._gone, self._fixed = gone, fixed
        self._new, self._shown = 0, None
