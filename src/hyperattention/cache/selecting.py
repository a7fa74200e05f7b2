"""A store that keeps all keys and reads a selection: sinks, window, the best pages, and draws from the other pages."""

from dataclasses import astuple

import torch
from torch import Tensor

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.buffer import grown
from hyperattention.cache.fitting import fit_new, fit_state, floating_type, insist
from hyperattention.cache.page_lists import page_lists
from hyperattention.cache.page_rank import PageRank
from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.cache.store import Store
from hyperattention.kernels.capped_list import capped_list_attention
from hyperattention.kernels.decode.operator import decode_best_pages, decode_pages, decodes_fused
from hyperattention.kernels.decode.page_plan import MOST_PAGES, PagePlan
from hyperattention.kernels.decode.reference import attend_to_pages, best_pages
from hyperattention.transforms import refuse_transforms
from hyperattention.types import Partial


class SelectingStore(Store):
    """Hold all keys with a summary of each page, and let each query read the keys of the best pages.

    Args:
        by: ranks pages.
        room: its budget is the number of keys that a step reads; sinks and window are always read.
        page: number of keys in a page.
        draws: number of keys drawn from the pages not read, with weights, so that the keys read represent all keys.
        most_queries: most queries of a step for which pages are chosen; a step with more queries, such as a prompt, reads
            all keys.
        lender: another layer's store whose choice of pages is reused; None to choose pages in this layer.
        layer: layer of the model, a counter of every draw.
        seed: seed of every draw.
    """

    def __init__(
        self,
        by: PageRank,
        room: CacheBudget,
        *,
        page: int = 16,
        draws: int = 0,
        most_queries: int = 32,
        lender: "SelectingStore | None" = None,
        layer: int = 0,
        seed: int = 0,
    ) -> None:
        """Start empty."""
        self.by, self.room, self.page, self.draws, self.most_queries = by, room, page, draws, most_queries
        self.lender, self.layer, self.seed = lender, layer, seed
        self.chosen: Tensor | None = None
        # whether none of them is missing, as far as can be told without a look at any tensor
        self._complete = False
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._summary: Tensor | None = None
        self._begin: Tensor | None = None
        self._padded = False
        self._seen = self._new = self._summed = 0

    @property
    def seen(self) -> int:
        """Tokens appended so far."""
        return self._seen

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return 0 if self._k is None else self._k.shape[0]

    @property
    def device(self) -> torch.device | None:
        """Device of keys and values."""
        return None if self._k is None else self._k.device

    @property
    def num_slots(self) -> int:
        """Number of all keys."""
        return self._seen

    @property
    def num_read(self) -> int:
        """The budget, or the number of all keys if that is smaller."""
        return min(self._seen, self.room.budget)

    @property
    def num_pages(self) -> int:
        """Pages that a query reads besides sinks, window and draws."""
        return max(1, (self.room.budget - self.room.sinks - self.room.window - self.page - self.draws) // self.page)

    @property
    def is_whole(self) -> bool:
        """Whether the current step reads every key."""
        return self._seen <= self.room.budget or self._new > self.most_queries

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys, values and summaries."""
        return sum(x.numel() * x.element_size() for x in (self._k, self._v, self._summary) if x is not None)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys after the others, and summarise the pages that they fill."""
        new = k.shape[2]
        if self._k is not None and self._v is not None:
            fit_new((k, v), (self._k, self._v))
        self._k, self._v = grown(self._k, k, self._seen), grown(self._v, v, self._seen)
        if self._begin is None:
            self._begin = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
        self._seen, self._new = self._seen + new, new
        return self._k[:, :, : self._seen], self._v[:, :, : self._seen]

    def mask_padding(self, live: Tensor) -> None:
        """Record where each row begins."""
        dead = (~live).sum(-1)
        if not bool(dead.any()):
            return
        first = torch.arange(live.shape[1], dtype=torch.int64, device=live.device) < dead[:, None]
        before = self._seen - self._new
        if bool((first == live).any()) or bool((dead > 0)[self._start < before].any()):
            raise ValueError(
                "padding stands after tokens: a cache read by pages supports padding on the left only; pad on the left"
            )
        self._begin, self._padded = self._start + dead, True
        for x in (self._k, self._v):
            if x is not None:
                x[:, :, before : self._seen].masked_fill_(~live[:, None, :, None], 0.0)

    @property
    def _start(self) -> Tensor:
        if self._begin is None:
            raise ValueError("the cache is empty: append keys and values first")
        return self._begin

    @property
    def _held(self) -> tuple[Tensor, Tensor]:
        if self._k is None or self._v is None:
            raise ValueError("the cache is empty: append keys and values first")
        return self._k, self._v

    def end_step(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> None:
        """Summarise the pages that are full now."""
        full = self._seen // self.page
        if self._k is None or full <= self._summed:
            return
        keys = self._k[:, :, self._summed * self.page : full * self.page].unflatten(2, (-1, self.page))
        self._summary = grown(self._summary, self.by.summarise(keys), self._summed)
        self._summed = full

    def attend(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> Partial:
        """Choose pages for every query, and compute attention over the chosen keys."""
        if self.draws:
            return self._attend_with_draws(q, scale, rule)
        refuse_transforms("attention to the pages of a cache", q, *self._held)
        (k, v), plan, fused = self._held, self._plan(q.shape[2]), decodes_fused(q, *self._held)
        reach, summary = self.by.kernel_reach, self._pages_of(q, plan)
        if fused and self.lender is None and reach is not None and summary.shape[2] <= MOST_PAGES:
            given = (q, k, v, summary, self._start, rule.sinks, list(astuple(plan)))
            self._complete = False
            out, lse, self.chosen = decode_best_pages(*given, reach, scale, rule.softcap)
            return Partial(out, lse)
        chosen = self.chosen = self._chosen(q, summary, plan, scale, rule)
        if fused:
            given = (q, k, v, chosen, self._start, rule.sinks, list(astuple(plan)))
            return Partial(*decode_pages(*given, scale, rule.softcap))
        begin = self._start if self._padded else None
        out, lse = attend_to_pages(
            q, (k, v), chosen, begin, plan, scale, rule.softcap, complete=(self.lender or self)._complete
        )
        return rule.drop_sinks(Partial(out, lse))

    def _plan(self, queries: int) -> PagePlan:
        """Say what queries read: all recent keys, from the edge of a page on, and pages before them."""
        recent = max(0, self._seen - queries - self.room.window) // self.page * self.page
        return PagePlan(self.page, self.room.sinks, recent, self._seen, self.num_pages)

    def _is_complete(self, plan: PagePlan) -> bool:
        """Return whether it is certain, without a look at any tensor, that as many pages are chosen as the plan says."""
        free = plan.recent // plan.page - plan.sinks // plan.page
        return not self._padded and free >= plan.num and self.by.kernel_reach is not None

    def _chosen(self, q: Tensor, summary: Tensor, plan: PagePlan, scale: float, rule: ScoreRule) -> Tensor:
        """Choose pages in PyTorch, or take the lender's: ``[lists, queries, pages]``, ascending; -1 for none."""
        if self.lender is not None:
            if self.lender.chosen is None:
                raise ValueError(
                    "the layer whose choice of pages is reused has chosen none: run attention in that layer first"
                )
            return self.lender.chosen
        self._complete = self._is_complete(plan)
        rows = q.unflatten(1, (summary.shape[1], -1))  # [batch, kv_heads, group, queries, head_dim]
        if not summary.shape[2]:
            shape = (rows.shape[0] * rows.shape[1], rows.shape[3], plan.num)
            return torch.full(shape, -1, dtype=torch.int64, device=q.device)
        score = rule.cap(self.by.rank(rows.flatten(2, 3).float() * scale, summary, plan.num))
        begin = self._start if self._padded else None
        return best_pages(score.unflatten(2, rows.shape[2:4]), begin, plan, complete=self._complete)

    def _pages_of(self, q: Tensor, plan: PagePlan) -> Tensor:
        """Return the summaries of all pages before the window."""
        if self._summary is None:
            return q.new_empty((q.shape[0], self._held[0].shape[1], 0, q.shape[3]))
        return self._summary[:, :, : plan.recent // self.page]

    def _attend_with_draws(self, q: Tensor, scale: float, rule: ScoreRule) -> Partial:
        """Choose pages for every query, and compute attention over lists of keys, some of which are drawn."""
        k, v = self._held
        batch, kv_heads = k.shape[:2]
        rows = q.unflatten(1, (kv_heads, -1))  # [batch, kv_heads, group, queries, head_dim]
        plan = self._plan(q.shape[2])
        self.chosen = self._chosen(q, self._pages_of(q, plan), plan, scale, rule)
        selection = page_lists(rows, self.chosen.long(), self._start, plan, self.draws, (self.seed, self.layer))
        tiles = rows.permute(0, 1, 3, 2, 4).flatten(0, 1)[:, :, :, None]  # [lists, queries, group, 1, head_dim]
        out, lse = capped_list_attention(tiles, k.flatten(0, 1), v.flatten(0, 1), selection, scale, rule.softcap)

        def restored(x: Tensor) -> Tensor:
            return x[:, :, :, 0].unflatten(0, (batch, kv_heads)).transpose(2, 3).flatten(1, 2)

        return rule.drop_sinks(Partial(restored(out), restored(lse)))

    def take_rows(self, index: Tensor) -> None:
        """Select batch rows of all tensors."""
        if self._k is not None and self._v is not None:
            index = index.to(self._k.device)
            self._k, self._v, self._begin = (x.index_select(0, index) for x in (self._k, self._v, self._start))
            self._summary = None if self._summary is None else self._summary.index_select(0, index)

    def crop(self, num: int) -> None:
        """Remove the latest tokens; every token is still held separately."""
        if num > self._seen:
            raise ValueError(f"cannot forget {num} tokens of {self._seen}: give at most {self._seen}")
        self._seen, self._new = self._seen - num, 0
        self._summed = min(self._summed, self._seen // self.page)

    def state(self) -> dict[str, Tensor]:
        """Copy keys and values; summaries are computed from them."""
        if self._k is None or self._v is None:
            raise ValueError("the cache is empty: append keys and values first")
        k, v = (x[:, :, : self._seen].clone(memory_format=torch.contiguous_format) for x in (self._k, self._v))
        return {"k": k, "v": v, "begin": self._start.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Replace keys and values, and compute their summaries again."""
        of_k, of_v, key = floating_type(state), floating_type(state, "v"), "batch kv_heads slots"
        wanted = {"k": (f"{key} head_dim", of_k), "v": (f"{key} value_dim", of_v), "begin": ("batch", torch.int64)}
        seen, begin = fit_state(state, wanted)["slots"], state["begin"]
        insist(((begin >= 0) & (begin <= seen)).all(), f"rows begin from 0 to {seen}")
        self._k, self._v, self._begin, self._padded = state["k"], state["v"], state["begin"], bool(begin.any())
        self._seen, self._new, self._summed, self._summary = self._k.shape[2], 0, 0, None
        self.end_step(self._k, 1.0)
