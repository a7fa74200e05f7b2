"""A store that keeps all keys and reads a selection: sinks, window, the best pages, and draws from the other pages."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.buffer import grown
from hyperattention.cache.fitting import fit_new, fit_state, floating_type, insist
from hyperattention.cache.page_rank import PageRank
from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.cache.store import Store
from hyperattention.kernels.capped_list import capped_list_attention
from hyperattention.random import uniform
from hyperattention.types import Partial, Runs, Selection


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
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._summary: Tensor | None = None
        self._begin: Tensor | None = None
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
        self._begin = self._start + dead
        for x in (self._k, self._v):
            if x is not None:
                x[:, :, before : self._seen].masked_fill_(~live[:, None, :, None], 0.0)

    @property
    def _start(self) -> Tensor:
        if self._begin is None:
            raise ValueError("the cache is empty: append keys and values first")
        return self._begin

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
        if self._k is None or self._v is None:
            raise ValueError("the cache is empty: append keys and values first")
        batch, kv_heads, _, _ = self._k.shape
        queries = q.shape[2]
        rows = q.unflatten(1, (kv_heads, -1))  # [batch, kv_heads, group, queries, head_dim]
        # all recent keys, from the edge of a page on
        recent = max(0, self._seen - queries - self.room.window) // self.page * self.page
        self.chosen = self._choose(rows, recent, scale, rule) if self.lender is None else self.lender.chosen
        selection = self._selection(rows, recent)
        tiles = rows.permute(0, 1, 3, 2, 4).flatten(0, 1)[:, :, :, None]  # [lists, queries, group, 1, head_dim]
        k, v = self._k.flatten(0, 1), self._v.flatten(0, 1)
        out, lse = capped_list_attention(tiles, k, v, selection, scale, rule.softcap)

        def restored(x: Tensor) -> Tensor:
            return x[:, :, :, 0].unflatten(0, (batch, kv_heads)).transpose(2, 3).flatten(1, 2)

        return rule.drop_sinks(Partial(restored(out), restored(lse)))

    def _choose(self, rows: Tensor, recent: int, scale: float, rule: ScoreRule) -> Tensor:
        """Rank the pages before `recent`, and take the best: ``[lists, queries, pages]``, ascending; -1 for none."""
        pages, num = recent // self.page, self.num_pages
        if not pages or self._summary is None:
            return rows.new_full((rows.shape[0] * rows.shape[1], rows.shape[3], num), -1, dtype=torch.int64)
        score = self.by.rank(rows.flatten(2, 3).float() * scale, self._summary[:, :, :pages], num)
        # [batch, kv_heads, queries, pages]
        score = torch.log_softmax(rule.cap(score), -1).unflatten(2, rows.shape[2:4]).amax(2)
        last = (torch.arange(pages, dtype=torch.int64, device=rows.device) + 1) * self.page
        score = score.masked_fill((last <= self._start[:, None] + self.room.sinks)[:, None, None], -torch.inf)
        best, index = score.topk(min(num, pages), -1)
        index = index.masked_fill(best == -torch.inf, -1).sort(-1).values
        return pad(index, (num - index.shape[-1], 0), value=-1).flatten(0, 1)

    def _selection(self, rows: Tensor, recent: int) -> Selection:
        """List sinks, chosen pages, draws and the window for every query."""
        batch, kv_heads, group, queries, _ = rows.shape
        lists, device, chosen = batch * kv_heads, rows.device, self.chosen
        if chosen is None:
            raise ValueError("the layer whose choice of pages is reused has chosen none: run attention in that layer first")
        begin = self._start[:, None].expand(-1, kv_heads).reshape(lists, 1).expand(-1, queries)
        sunk = begin + self.room.sinks
        edge = torch.full_like(begin, recent)
        runs = [
            Runs(begin[..., None], max(1, self.room.sinks), _zeros(begin[..., None]), begin, torch.minimum(sunk, edge)),
            Runs(chosen * self.page, self.page, _zeros(chosen).masked_fill(chosen < 0, -torch.inf), sunk, edge),
        ]
        if self.draws:
            runs.append(self._drawn(chosen, sunk, edge))
        end = torch.full_like(begin, self._seen)
        low = torch.maximum(begin, edge)
        runs.append(Runs(edge[..., None], self._seen - recent, _zeros(edge[..., None]), low, end, causal=queries > 1))
        limit = torch.arange(queries, dtype=torch.int64, device=device) + (self._seen - queries + 1)
        return Selection(
            tuple(runs),
            limit[None, :, None].expand(lists, -1, group).contiguous(),
            torch.arange(lists, dtype=torch.int64, device=device),
        )

    def _drawn(self, chosen: Tensor, sunk: Tensor, edge: Tensor) -> Runs:
        """Draw keys evenly from the pages not chosen, one from each of equal strata, with weights."""
        lists, queries, _ = chosen.shape
        first = sunk // self.page  # sinks that lie in a page they cut can be drawn as well; such draws do not count
        pages = edge // self.page
        inside = (chosen >= first[..., None]) & (chosen < pages[..., None])
        left = ((pages - first - inside.sum(-1)) * self.page).clamp(min=0)  # [lists, queries]
        head = torch.arange(lists, dtype=torch.int64, device=chosen.device)[:, None, None] % self._heads
        at = torch.arange(queries, dtype=torch.int64, device=chosen.device)[:, None] + (self._seen - queries)
        place = torch.arange(self.draws, dtype=torch.int64, device=chosen.device)
        point = (place + uniform((self.seed, self.layer, head, at, place), chosen.device)) / self.draws
        rank = (point * left[..., None]).long().clamp(max=(left[..., None] - 1).clamp(min=0))
        # the index of the r-th page that is not chosen is r plus the number of chosen pages before it
        gap = torch.where(inside, chosen - first[..., None], 2**40).sort(-1).values
        gap = gap - torch.arange(gap.shape[-1], dtype=torch.int64, device=gap.device)
        page = rank // self.page
        page = page + torch.searchsorted(gap, page, right=True) + first[..., None]
        share = left[..., None].float() / self.draws
        weight = share.clamp(min=1.0).log().expand(page.shape)
        # fewer keys than draws: each key is drawn several times, and each draw counts for its share
        weight = torch.where(left[..., None] < self.draws, share.log(), weight)
        return Runs(page * self.page + rank % self.page, 1, weight, sunk, edge)

    @property
    def _heads(self) -> int:
        return 1 if self._k is None else self._k.shape[1]

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
        self._k, self._v, self._begin = state["k"], state["v"], state["begin"]
        self._seen, self._new, self._summed, self._summary = self._k.shape[2], 0, 0, None
        self.end_step(self._k, 1.0)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)
