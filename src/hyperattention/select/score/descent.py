"""Draw keys by estimates of the weights they would get, found by opening ever smaller blocks where weight is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import log

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.check import positive
from hyperattention.select.draw import Density, Distribution
from hyperattention.select.score.blocks import KeySketch, in_panels
from hyperattention.select.score.mass import inverse
from hyperattention.select.score.pooling import any_left, edges, pool_queries, seen_keys
from hyperattention.select.score.representatives import Representatives
from hyperattention.select.stage import LookAhead, Taken
from hyperattention.tiling import Tiles

# blocks that an edge of what is left can cut: begin, hole begin, hole end, end
_EDGES = 4
# rounds in which probabilities above one draw's share are cut to it and the rest is given to the others
_CLIP_ROUNDS = 4


@dataclass(frozen=True)
class Level:
    """One level of a descent.

    Args:
        block_size: keys in a block.
        keep: blocks opened for each tile, at least four, so that blocks cut by an edge always are.
        by: what stands for the keys of a block.

    Raises:
        ValueError: if a number is not positive, `keep` is below four, or the representatives do not fit the block.
    """

    block_size: int
    keep: int
    by: Representatives

    def __post_init__(self) -> None:
        positive("Level", block_size=self.block_size, keep=self.keep)
        if self.keep < _EDGES:
            raise ValueError(f"{self!r}: keep at least {_EDGES} blocks, as many as window and sequence can cut")
        self.by.check(self.block_size)


_KEYS = Representatives()


@dataclass(frozen=True)
class _Leaves(Distribution):
    """Probabilities of blocks that stayed closed and of keys of opened ones, spread evenly over the keys of each."""

    first: Tensor  # [lists, chunk, leaves]
    size: Tensor  # [leaves]
    mass: Tensor  # [lists, chunk, leaves], summing to one; 0 where a block was opened or is taken

    def draw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Find the leaf, then the key at the same share of the way through it."""
        leaf, inside = inverse(self.mass, point)
        size = self.size[leaf]
        return self.first.gather(2, leaf) + (inside * size).long(), self.mass.gather(2, leaf) / size

    def share(self, index: Tensor) -> Tensor:
        """Look up the leaf that holds a key: the last of those alive that begins at or before it."""
        beyond = torch.iinfo(torch.int64).max
        first, order = self.first.masked_fill(self.mass == 0, beyond).sort(-1)
        at = (torch.searchsorted(first, index.contiguous(), right=True) - 1).clamp(min=0)
        leaf = order.gather(2, at)
        inside = index - self.first.gather(2, leaf)
        size = self.size[leaf]
        return (self.mass.gather(2, leaf) / size).masked_fill((inside < 0) | (inside >= size), 0.0)


@dataclass(frozen=True)
class Descent(Density):
    """Draw keys in proportion to the largest weight that a query of the tile would give them, estimated from coarse to fine.

    a_iB = n_r exp(U q_i . U k_r - z_i),   p_B ~ sum_r max_i a_iB over the representatives r of block B, of n_r keys each;
    the blocks with the largest p_B are opened, level by level, down to keys; U = principal directions of the first keys.

    Every query is normalised (z_i, a lower estimate of its log-sum-exp that grows on the way down) before queries are
    combined, so that a sharp one is heard beside a diffuse one. What is opened and what stays closed share one law: heavy
    keys are listed for certain, light ones now and then, closed blocks by their estimated weight. A share of the
    probability is spread evenly over all that is left, so that no weight exceeds keys / (share * draws) however wrong the
    estimate. Points are evenly spaced from one random offset a tile.

    Source: Han et al., 2023 (arXiv:2310.05869), its idea; Hansen and Hurwitz, 1943, sampling in proportion to size; Madow,
    1949, evenly spaced points; Singhania et al., 2024 (arXiv:2406.02542), keys in their principal directions.
    Differs: a tree in place of hashing, one law over its leaves.
    Cost: pooled queries times representatives scored, in short products; grows with the length only by the first level's.
    Guarantee: numerator and denominator unbiased, whatever the estimate.

    Args:
        levels: from coarse to fine; each block size divides the one before.
        dim: numbers kept of each key; of `head_dim` or more, keys stay whole.
        pooled: averaged queries of each tile and head.
        uniform_share: share of the probability that is spread evenly.

    Raises:
        ValueError: if a count is not positive, there is no level, block sizes do not divide one another, or the share is not
            between 0 and 1.
    """

    levels: tuple[Level, ...] = field(default_factory=lambda: (Level(64, 96, Representatives(1, 3)), Level(16, 32, Representatives(2, 1))))
    dim: int = 64
    pooled: int = 32
    uniform_share: float = 0.2

    def __post_init__(self) -> None:
        positive("Descent", dim=self.dim, pooled=self.pooled)
        if not self.levels or not all(isinstance(level, Level) for level in self.levels):
            raise ValueError(f"Descent(levels={self.levels!r}): give a tuple of at least one Level")
        for above, below in pairwise(self.levels):
            if above.block_size % below.block_size or above.block_size == below.block_size:
                raise ValueError(
                    f"blocks of {above.block_size} keys do not fall into several of {below.block_size}: use a divisor"
                )
        if not 0.0 < self.uniform_share < 1.0:
            raise ValueError(
                f"Descent(uniform_share={self.uniform_share}): it must lie between 0 and 1 to bound the weights"
            )

    @property
    def looks_ahead(self) -> LookAhead:
        """Draws of a tile depend on all of its queries."""
        return LookAhead.TILE

    @property
    def evenly(self) -> bool:
        """Points are evenly spaced."""
        return True

    def seam(self, tiles: Tiles) -> int:
        """Number of the first tile that sees more of the coarsest blocks than are opened: from there on they are scored."""
        if not tiles.problem.causal:
            return 0
        free = self.levels[0].keep * self.levels[0].block_size // tiles.size
        return max(0, free - tiles.problem.offset // tiles.size)

    def numbers(self, tiles: Tiles) -> int:
        """Count the scores, and the representatives gathered, of the level that has most."""
        rows, width = self.pooled * tiles.problem.group, min(self.dim, tiles.problem.k.shape[-1])
        return int(max(columns * (rows + width) for columns in self._columns(tiles.problem.num_keys))) + 1

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count products of pooled queries with representatives, per query."""
        columns = sum(self._columns(num_keys / (2 if causal else 1)))
        return self.pooled / tile * columns * min(self.dim, head_dim) / head_dim

    def _columns(self, visible: float) -> list[float]:
        """Count the representatives scored for each tile, level by level, keys last."""
        below = [(level.block_size, level.by.num) for level in self.levels[1:]] + [(1, 1)]
        top, columns = self.levels[0], []
        if visible > top.keep * top.block_size:
            columns.append(visible / top.block_size * top.by.num)
        for level, (size, num) in zip(self.levels, below, strict=True):
            visible = min(visible, level.keep * level.block_size)
            columns.append(visible / size * num)
        return columns

    def prepare(self, tiles: Tiles, taken: Taken, num: int) -> Callable[[slice], Distribution]:
        """Project keys and pooled queries, and choose what stands for every block."""
        k = tiles.problem.k.flatten(0, 1)
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        query = pool_queries(tiles, self.pooled).to(k.dtype) * tiles.problem.scale
        if self.dim < k.shape[2]:
            # while no more keys than draws are left all are listed: those keys may serve as a sample of the rest
            head = k[:, :num]
            basis = KeySketch(self.dim).basis(head)
            # scores of centred keys differ by a constant a query
            k, query = k @ basis - head.mean(1, keepdim=True) @ basis, query @ basis[:, None]
        # a key or query that is not finite tells nothing: it is left to the even share
        k, query = (torch.nan_to_num(x, posinf=0.0, neginf=0.0) for x in (k, query))
        top = self.levels[0].block_size
        filled = in_panels(k, top, 1).flatten(1, 3)
        # one block more, of zeros, stands in where fewer are left than may be opened
        filled = pad(filled, (0, 0, 0, top))
        summaries = [level.by.choose(filled.unflatten(1, (-1, level.block_size))) for level in self.levels]
        summaries.append(filled[:, None])
        walk = _Walk(tiles, edges(tiles, taken), tiles.by_list(tiles.start)[..., None], query, tuple(summaries), self, num)
        return walk.law


@dataclass(frozen=True)
class _Blocks:
    """The blocks of one level that are looked at, for a chunk of tiles.

    Args:
        first: first key of each block, ``[lists, chunk, blocks]``.
        size: keys in a block.
        every: whether these are all blocks from the first on, the same for every tile.
        cut: how many of the leading ones an edge of what is left may cut.
    """

    first: Tensor
    size: int
    every: bool
    cut: int


@dataclass(frozen=True)
class _Walk:
    """Everything a descent needs, made once for all tiles."""

    tiles: Tiles
    left: tuple[Tensor, Tensor, Tensor, Tensor]  # [lists, tiles, 1]
    start: Tensor  # [lists, tiles, 1]
    query: Tensor  # [lists, tiles, rows, width]
    summaries: tuple[Tensor, ...]  # of each level, keys last: [lists, representatives, blocks, width]
    density: Descent
    num: int

    def law(self, part: slice) -> _Leaves:
        """Descend for a chunk of tiles.

        Args:
            part: the chunk; it does not straddle the density's seam.

        Returns:
            the law of the leaves.
        """
        levels = self.density.levels
        left = tuple(x[:, part] for x in self.left)
        query = self.query[:, part]
        leaves: list[tuple[Tensor, int, Tensor, Tensor]] = []
        size = levels[0].block_size
        number = -(-seen_keys(self.tiles, part) // size)
        first = (torch.arange(number, device=query.device) * size).expand(*query.shape[:2], number)
        blocks = _Blocks(first, size, True, number)
        seen = query.new_full(query.shape[:3], -torch.inf)
        for depth, level in enumerate(levels):
            below = levels[depth + 1].block_size if depth + 1 < len(levels) else 1
            if depth or number > level.keep:
                mass, seen = self._mass(depth, blocks, query, part, left, seen)
                whole = _whole(blocks, left)
                forced = ~whole & any_left(blocks.first, blocks.size, left)
                rank = mass.masked_fill(~whole, -1.0).masked_fill(forced, torch.inf)
                # blocks that an edge cuts come first
                chosen = rank.topk(min(level.keep, rank.shape[2]), -1)[1]
                closed = whole.scatter(2, chosen, False)
                leaves.append((blocks.first, blocks.size, mass, closed))
                empty = rank.gather(2, chosen) < 0
                opened, every = blocks.first.gather(2, chosen).masked_fill(empty, self._nothing), False
            else:
                opened, every = blocks.first, blocks.every
            inside = torch.arange(0, blocks.size, below, device=query.device)
            cut = opened.shape[2] if every else min(_EDGES, opened.shape[2])
            blocks = _Blocks((opened[..., None] + inside).flatten(2), below, every, cut * len(inside))
        mass, _ = self._mass(len(levels), blocks, query, part, left, seen)
        leaves.append((blocks.first, 1, mass, _whole(blocks, left)))
        return self._leaves(leaves, left)

    @property
    def _nothing(self) -> int:
        """First key of the block of zeros, which is never left."""
        return self.summaries[-1].shape[2] - self.density.levels[0].block_size

    def _mass(self, depth: int, blocks: _Blocks, query: Tensor, part: slice, left, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate the weight of every block; `seen` is each query's log-sum-exp as far as it is known from above.

        Returns:
            ``[lists, chunk, blocks]``, and `seen` with what this level adds.
        """
        by = self.density.levels[depth].by if depth < len(self.density.levels) else _KEYS
        score = self._score(depth, blocks, query)  # [lists, chunk, rows, representatives, blocks]
        self._hide(score, blocks, part, left)
        top = score.flatten(3).amax(-1)
        if blocks.size > 1 or blocks.every:
            seen = torch.maximum(seen, _log_sum_exp(score[..., 0, :]) + log(blocks.size))
        bar = torch.maximum(seen, top).nan_to_num_(neginf=0.0)
        weight = score.sub_(bar[..., None, None]).amax(2).exp_()
        return by.total(weight, blocks.size), seen

    def _score(self, depth: int, blocks: _Blocks, query: Tensor) -> Tensor:
        """Multiply pooled queries and representatives."""
        summary, width = self.summaries[depth], query.shape[3]
        (lists, chunk), (num, number) = query.shape[:2], summary.shape[1:3]
        if blocks.every:
            shared = summary[:, :, : blocks.first.shape[2]].flatten(1, 2)
            return (query.flatten(1, 2) @ shared.transpose(1, 2)).view(lists, chunk, -1, num, blocks.first.shape[2])
        # the blocks of an opened one stand together: one copy a representative
        parent = self.density.levels[depth - 1].block_size
        children = parent // blocks.size
        place = torch.arange(lists * num, device=query.device).view(lists, 1, num, 1) * (number // children)
        row = blocks.first[:, :, None, ::children] // parent + place  # [lists, chunk, representatives, opened]
        some = summary.view(-1, children * width).index_select(0, row.flatten()).view(lists * chunk, -1, width)
        return torch.bmm(query.flatten(0, 1), some.transpose(1, 2)).view(lists, chunk, -1, num, blocks.first.shape[2])

    def _hide(self, score: Tensor, blocks: _Blocks, part: slice, left: tuple[Tensor, ...]) -> None:
        """Keep the tile's own and later keys out of what a query knows, but for the keys that are left to it."""
        problem, until = self.tiles.problem, blocks.cut
        begin = 0
        if blocks.every and problem.rank is None:
            # by position alone, which needs no look at the device: blocks before the chunk's first tile
            before = (problem.offset // self.tiles.size + part.start) * self.tiles.size
            begin = (min(before, problem.num_keys) if problem.causal else problem.num_keys) // blocks.size
        some = replace(blocks, first=blocks.first[..., begin:until])
        known = some.first + some.size <= (self.start[:, part] if problem.causal else left[3])
        known |= _whole(some, left)
        score[..., begin:until].masked_fill_(~known[:, :, None, None], -torch.inf)

    def _leaves(self, leaves: Sequence[tuple[Tensor, int, Tensor, Tensor]], left: tuple[Tensor, ...]) -> _Leaves:
        """Turn masses into probabilities: none of a key much above one draw's share, none of any below the even share."""
        first, mass, alive = (torch.cat([leaf[i].expand(leaf[3].shape) for leaf in leaves], 2) for i in (0, 2, 3))
        size = torch.cat([mass.new_full(leaf[0].shape[2:], leaf[1], dtype=torch.int64) for leaf in leaves])
        mass = torch.nan_to_num(mass, posinf=0.0).masked_fill_(~alive, 0.0)
        keys = leaves[-1][0].shape[2]
        share = self.density.uniform_share
        total = mass.sum(-1, keepdim=True)
        for _ in range(_CLIP_ROUNDS):
            fine = mass[..., -keys:]
            torch.minimum(fine, total / (self.num * (1 - share)), out=fine)
            total = mass.sum(-1, keepdim=True)
        begin, hole_begin, hole_end, end = left
        count = (hole_begin - begin + end - hole_end).clamp(min=1)
        mass = mass.mul_((1 - share) / total.clamp(min=torch.finfo(mass.dtype).tiny)).add_(alive * (size * share / count))
        return _Leaves(first, size, mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny))


def _whole(blocks: _Blocks, left: tuple[Tensor, ...]) -> Tensor:
    """Tell which blocks are left whole, ``[lists, chunk, blocks]``."""
    begin, hole_begin, hole_end, end = left
    until = blocks.first + blocks.size
    return ((blocks.first >= begin) & (until <= hole_begin)) | ((blocks.first >= hole_end) & (until <= end))


def _log_sum_exp(x: Tensor) -> Tensor:
    """Log-sum-exp over the last axis; by the largest softmax weight, which takes a third of the time of exponentials."""
    return x.amax(-1) - torch.softmax(x, -1).amax(-1).log()
