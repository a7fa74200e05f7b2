"""The hierarchical search: score the blocks of a level, open the best, score the blocks inside, down to the last level."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log

import torch
from torch import Tensor

from hyperattention.select.score.leaves import Closed, Leaves, Opened, leaves_of
from hyperattention.select.score.level import EDGES, Level, first_level, opened_at
from hyperattention.select.score.pooling import any_left, seen_keys
from hyperattention.select.score.scratch import Scratch
from hyperattention.tiling import Tiles

# number of edges of the remaining keys that can cut a block under a causal mask: no key remains after the hole
_CAUSAL_EDGES = 2
# scores and gathered representatives in one batch of tiles: few enough for the CPU cache
BATCH_NUMBERS = 3 * 2**19


def opened_across(tiles: Tiles, near: int, size: int, most: int) -> int:
    """Count the opened blocks that may hold keys of their tile or later tiles in addition to remaining keys.

    Args:
        tiles: the tiled problem.
        near: number of keys directly before each tile that earlier stages took.
        size: number of keys in a block.
        most: blocks that are opened.

    Returns:
        their largest number.
    """
    if not tiles.problem.causal:
        return min(EDGES, most)
    # the last remaining key is near + 1 before the tile, so its block ends at most size - near - 1 keys into the tile
    return 0 if size <= near + 1 else min(_CAUSAL_EDGES, most)


@dataclass(frozen=True)
class _Blocks:
    """The blocks of one level that are scored, for a chunk of tiles.

    Args:
        first: first key of each block, ``[lists, chunk, blocks]``.
        size: number of keys in a block.
        every: whether these are all blocks from the first on, the same for every tile.
        cut: number of leading blocks that may extend into the tile or beyond it; all blocks if `every`.
    """

    first: Tensor
    size: int
    every: bool
    cut: int

    def whole(self, left: tuple[Tensor, ...]) -> Tensor:
        """Return which blocks contain no key of an earlier stage, ``[lists, chunk, blocks]``."""
        begin, hole_begin, hole_end, end = left
        until = self.first + self.size
        return ((self.first >= begin) & (until <= hole_begin)) | ((self.first >= hole_end) & (until <= end))


@dataclass(frozen=True)
class Walk:
    """The data of a hierarchical search, computed once for all tiles.

    Args:
        levels: levels from coarse to fine.
        tiles: the tiled problem.
        left: edges of the remaining keys, from `edges`.
        near: number of keys directly before each tile that earlier stages took.
        query: pooled queries, scaled, ``[lists, tiles, rows, width]``, in the precision of `summaries`.
        summaries: representatives of each level's blocks, ``[lists, blocks, representatives, width]``; the last of the
            coarsest blocks is all zeros.
        moments: means of blocks, then their variances, for each possible first level,
            ``[lists, blocks, 2 * width]``.
        num: number of draws of each tile.
        uniform_share: share of the draws on closed blocks that is spread uniformly.
        gathered: memory for representatives of opened blocks.
        rough: memory for scores in the precision of `summaries`.
        scores: memory for scores.
    """

    levels: tuple[Level, ...]
    tiles: Tiles
    left: tuple[Tensor, Tensor, Tensor, Tensor]
    near: int
    query: Tensor
    summaries: tuple[Tensor, ...]
    moments: tuple[Tensor, ...]
    num: int
    uniform_share: float
    gathered: Scratch
    rough: Scratch
    scores: Scratch

    def law(self, part: slice) -> Leaves:
        """Search for a chunk of tiles.

        Args:
            part: the chunk; no seam lies inside it.

        Returns:
            the distribution of the leaves.
        """
        left, closed, keep = tuple(x[:, part] for x in self.left), [], opened_at(self.levels, self.num)
        visible = seen_keys(self.tiles, part)
        begin = first_level(self.levels, self.num, visible)
        blocks = self._all(part, self.levels[begin].block_size, visible)
        seen = self._seen(begin, blocks, part)
        for depth in range(begin, len(self.levels)):
            opened = blocks
            # only the first level skips blocks: no chunk crosses its seam, but at later levels the result would depend on
            # the chunk
            if depth > begin or blocks.first.shape[2] > keep[depth]:
                found, opened = self._open(depth, keep[depth], blocks, part, left, seen)
                closed.append(found)
            blocks = self._inside(opened, self.levels[depth + 1].block_size if depth + 1 < len(self.levels) else 1)
        return leaves_of(Opened(blocks.first, blocks.whole(left)), closed[::-1], left, self.num, self.uniform_share)

    def _all(self, part: slice, size: int, visible: int) -> _Blocks:
        """Begin with all blocks of `size` keys that any tile of the chunk can see."""
        number = -(-visible // size)
        first = torch.arange(number, dtype=torch.int64, device=self.query.device) * size
        return _Blocks(first.expand(self.query.shape[0], part.stop - part.start, -1), size, True, number)

    def _open(
        self, depth: int, keep: int, blocks: _Blocks, part: slice, left: tuple[Tensor, ...], seen: Tensor
    ) -> tuple[Closed, _Blocks]:
        """Choose the blocks with the largest mass, and all blocks that an edge cuts.

        Returns:
            all blocks, of which those not opened are leaves; and the opened blocks: first those cut by an edge that may
            extend into the tile, then the others ascending, which is the fastest order to read memory.
        """
        mass, whole = self._mass(depth, blocks, part, seen), blocks.whole(left)
        rank = torch.nan_to_num(mass, nan=0.0).masked_fill_(~whole, -1.0)
        rank = rank.masked_fill_(~whole & any_left(blocks.first, blocks.size, left), torch.inf)
        best, chosen = rank.topk(min(keep, rank.shape[2]), -1)
        # if fewer blocks remain than may be opened, the zero block fills the places: other blocks may lie ahead of the tile
        nothing = (self.summaries[0].shape[1] - 1) * self.levels[0].block_size
        first = blocks.first.gather(2, chosen).masked_fill_(best < 0, nothing)
        found = Closed(blocks.first, blocks.size, mass, whole.scatter(2, chosen, False))
        cut = opened_across(self.tiles, self.near, blocks.size, first.shape[2])
        # both ascending: for equal values the order of topk depends on the number of blocks, and so on the chunk
        first = torch.cat([part.sort()[0] for part in first.split([cut, first.shape[2] - cut], 2)], 2)
        return found, _Blocks(first, blocks.size, False, cut)

    def _inside(self, opened: _Blocks, size: int) -> _Blocks:
        """Return the parts of opened blocks, in blocks of `size` keys."""
        step = torch.arange(0, opened.size, size, dtype=torch.int64, device=opened.first.device)
        return replace(opened, first=(opened.first[..., None] + step).flatten(2), size=size, cut=opened.cut * len(step))

    def _seen(self, begin: int, blocks: _Blocks, part: slice) -> Tensor:
        """Estimate each query's log-sum-exp over all visible keys, ``[lists, chunk, rows]``.

        The scores of a block are treated as normal: log sum_j exp(q . k_j) ~ q . mean + 1/2 q^2 . variance + log size. Means
        alone would be too small for queries with diffuse attention, which would then dominate queries with sharp attention.

        Returns:
            a finite estimate; the smallest finite number if no key is visible.
        """
        known, seen = self._known(blocks, part), self.scores.like.new_empty(self.query[:, part, :, 0].shape)
        for some, number, hidden in self._batches(blocks, part, 1):
            query = self.query[:, part][:, some]
            lists, chunk, rows, _ = query.shape
            query = torch.cat([query, query.square().mul_(0.5)], 3).flatten(1, 2)
            score = self._product(query, self.moments[begin][:, :number], self.scores.take(lists, chunk * rows, number))
            score = score.view(lists, chunk, rows, number)
            _hide(score, known[:, some], hidden, number, 1)
            # by the largest softmax weight, which takes a third of the time of exp
            top = score.amax(-1)
            seen[:, some] = top - torch.softmax(score, -1, out=score).amax(-1).log_()
        return torch.nan_to_num_(seen, nan=torch.finfo(seen.dtype).min).add_(log(blocks.size))

    def _mass(self, depth: int, blocks: _Blocks, part: slice, seen: Tensor) -> Tensor:
        """Estimate the weight of every block: the largest that any query gives it, ``[lists, chunk, blocks]``."""
        by = self.levels[depth].by
        known = self._known(blocks, part)
        best = self.scores.like.new_empty((*blocks.first.shape, by.num))
        spread = self.left[3][:, part].clamp(min=1).to(best.dtype).log()
        for some, number, begin in self._batches(blocks, part, by.num):
            score = self._score(depth, blocks, self.query[:, part][:, some], some, number)
            _hide(score, known[:, some], begin, min(number, blocks.cut), by.num)
            top = score.amax(-1)
            # a sum of n exponentials is between the largest and n times the largest, so the estimate is clamped to this
            # range
            bar = torch.minimum(torch.maximum(seen[:, some], top), top + spread[:, some])
            best[:, some, :number] = score.sub_(bar[..., None]).amax(2).unflatten(-1, (number, by.num))
            if number < best.shape[2]:
                best[:, some, number:] = -torch.inf
        return by.total(best.exp_(), blocks.size)

    def _score(self, depth: int, blocks: _Blocks, query: Tensor, some: slice, number: int) -> Tensor:
        """Multiply pooled queries and representatives: ``[lists, batch, rows, blocks * representatives]``."""
        summary, (lists, chunk, rows, width) = self.summaries[depth], query.shape
        if blocks.every:
            shared = summary[:, :number].flatten(1, 2)
            score = self.scores.take(lists, chunk * rows, shared.shape[1])
            return self._product(query.flatten(1, 2), shared, score).view(lists, chunk, rows, -1)
        # the parts of an opened block are contiguous: one copy per block
        parent = self.levels[depth - 1].block_size
        children = parent // blocks.size
        source = summary.view(-1, children * summary.shape[2] * width)
        place = torch.arange(lists, dtype=torch.int64, device=query.device)[:, None, None] * (len(source) // lists)
        row = (blocks.first[:, some, ::children] // parent + place).flatten()
        inside = self.gathered.take(len(row), source.shape[1])
        torch.index_select(source, 0, row, out=inside)
        inside = inside.view(lists * chunk, -1, width)
        score = self.scores.take(lists * chunk, rows, inside.shape[1])
        return self._product(query.flatten(0, 1), inside, score).view(lists, chunk, rows, -1)

    def _product(self, query: Tensor, key: Tensor, score: Tensor) -> Tensor:
        """Multiply in the precision of `key`, into `score`."""
        if key.dtype == score.dtype:
            return torch.bmm(query, key.transpose(1, 2), out=score)
        rough = self.rough.take(*score.shape)
        return score.copy_(torch.bmm(query, key.transpose(1, 2), out=rough))

    def _known(self, blocks: _Blocks, part: slice) -> Tensor:
        """Return which blocks a query may use: those before its tile that hold remaining keys."""
        some = blocks if blocks.every else replace(blocks, first=blocks.first[..., : blocks.cut])
        left = tuple(x[:, part] for x in self.left)
        until = self.tiles.by_list(self.tiles.start)[:, part, None] if self.tiles.problem.causal else left[3]
        return (some.first + some.size <= until) | some.whole(left)

    def _batches(self, blocks: _Blocks, part: slice, num: int) -> Iterator[tuple[slice, int, int]]:
        """Cut a chunk into batches of few tiles.

        Yields:
            the tiles of the chunk, the number of blocks they score, and the first block that some tiles may not use.
        """
        problem, (lists, _, rows, width) = self.tiles.problem, self.query.shape
        count, total = blocks.first.shape[1:]
        numbers = total * num * (rows if blocks.every else rows + width)
        step = max(1, BATCH_NUMBERS // (lists * max(1, numbers)))
        for at in range(0, count, step):
            some, number, begin = slice(at, min(at + step, count)), total, 0
            if blocks.every:
                # by position, without reading from the device
                whole = slice(part.start + some.start, part.start + some.stop)
                number = min(total, -(-seen_keys(self.tiles, whole) // blocks.size))
                before = self.tiles.number(whole.start) * self.tiles.size
                before = max(0, min(before, problem.num_keys)) if problem.causal else problem.num_keys
                begin = before // blocks.size if problem.rank is None else 0
            yield some, number, begin


def _hide(score: Tensor, known: Tensor, begin: int, until: int, num: int) -> None:
    """Overwrite the scores ``[lists, batch, rows, blocks * num]`` of blocks that must not be used, between two indices."""
    if until > begin:
        # one flag per score: a mask that is broadcast over the last axis takes several times as long
        hidden = (~known[:, :, None, begin:until]).repeat_interleave(num, 3)
        score[..., begin * num : until * num].masked_fill_(hidden, -torch.inf)
