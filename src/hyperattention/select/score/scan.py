"""Score every key for pooled queries, in 8-bit integers if the processor multiplies them fast."""

from dataclasses import dataclass, replace
from math import log
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hyperattention.select.score.eight_bits import EightBitKeys, rounded_queries
from hyperattention.select.score.pooling import seen_keys
from hyperattention.select.score.precision import for_estimates, integers_are_fast
from hyperattention.select.score.scratch import Scratch
from hyperattention.tiling import Tiles

# scores in one product: few enough for the CPU cache
_SCORES = 2**21
# below any score, and large enough that subtraction does not overflow 32-bit integers
_HIDDEN = -(2**29)


@dataclass(frozen=True)
class Scan:
    """Rounded keys and pooled queries, and the data that normalises every query.

    Args:
        tiles: the tiled problem.
        query: pooled queries, with a separate axis for heads, because each head has its own unit.
        keys: centred keys, in the dtype of `query`.
        unit: score that one integer step represents, for each tile and head.
        pooled: the queries before rounding.
        moments: means of blocks of keys, then their variances.
        scores: memory for scores.
        precise: tiles for which integers are precise enough.
        floats: the same in floats, for all other tiles; None if this one is in floats.
    """

    BLOCK: ClassVar[int] = 64

    tiles: Tiles
    query: Shaped[Tensor, "lists tiles group pooled width"]
    keys: Shaped[Tensor, "lists keys width"]
    unit: Float[Tensor, "lists tiles group 1"]
    pooled: Float[Tensor, "lists tiles rows width"]
    moments: Float[Tensor, "lists blocks moments"]
    scores: Scratch
    precise: Bool[Tensor, "lists tiles"] | None = None
    floats: "Scan | None" = None

    @classmethod
    def of(cls, tiles: Tiles, k: Tensor, query: Tensor, num: int) -> "Scan":
        """Centre, estimate normalisers and round.

        Args:
            tiles: the tiled problem.
            k: the keys that any tile scans, ``[lists, keys, head_dim]``.
            query: pooled queries, scaled, ``[lists, tiles, rows, head_dim]``.
            num: number of leading keys that determine centre and scale, so that no tile looks ahead.

        Returns:
            the rounded keys and queries.
        """
        k = k.to(query.dtype)
        head = k[:, :num]
        # a key or query that is not finite gives no information: only the uniform share covers it
        keys = torch.nan_to_num(k - head.mean(1, keepdim=True), nan=0.0, posinf=0.0, neginf=0.0)
        query = torch.nan_to_num(query, nan=0.0, posinf=0.0, neginf=0.0)
        grouped = query.unflatten(2, (tiles.problem.group, -1))
        unit = torch.ones((*grouped.shape[:3], 1), dtype=query.dtype, device=query.device)
        estimated = for_estimates(keys)
        floats = cls(tiles, for_estimates(grouped), estimated, unit, query, _moments(keys), Scratch(estimated, _SCORES))
        return floats._in_integers(keys, keys[:, :num]) if integers_are_fast(query) else floats

    def _in_integers(self, keys: Tensor, first: Tensor) -> "Scan":
        """Round to 8 bits, and keep this scan for the tiles for which that is too coarse."""
        rounded = EightBitKeys.of(keys, first)
        # channel by channel, the scale of the keys is moved to the queries
        scaled = self.pooled.unflatten(2, self.query.shape[2:4]) * rounded.step[:, :, None, None]
        known = self.tiles.by_list(self.tiles.known)
        precise = torch.stack([rounded.precise(one, *each) for one, each in enumerate(zip(scaled, known, strict=True))])
        query, unit = rounded_queries(scaled)
        scores = Scratch(keys.new_empty(0, dtype=torch.int32), _SCORES)
        return replace(self, query=query, keys=rounded.keys, unit=unit, scores=scores, precise=precise, floats=self)

    def shares(self, part: slice, num: int) -> Float[Tensor, "lists chunk num"]:
        """Estimate the largest share that any query of a tile gives each of the first `num` keys, for a chunk of tiles."""
        lists, _, group, pooled, _ = self.query.shape
        best = self.pooled.new_full((lists, part.stop - part.start, num), -torch.inf)
        seen = self._log_sums(part, num).unflatten(2, (group, pooled))
        on_cpu = self.query.device.type == "cpu"
        step = max(1, _SCORES // (group * pooled * max(1, num))) if on_cpu else part.stop - part.start
        for at in range(part.start, part.stop, step):
            some = slice(at, min(at + step, part.stop))
            count = min(num, seen_keys(self.tiles, some))
            inside = slice(some.start - part.start, some.stop - part.start)
            for one in range(lists):
                best[one, inside, :count] = self._best(one, some, count, seen[one, inside])
        return best.exp_()

    def _log_sums(self, part: slice, num: int) -> Float[Tensor, "lists chunk rows"]:
        """Estimate each query's log-sum-exp over complete blocks before its tile, as if scores in a block were normal."""
        query, moments = self.pooled[:, part], self.moments[:, : num // self.BLOCK]
        score = torch.cat([query, query.square().mul_(0.5)], 3).flatten(1, 2) @ moments.transpose(1, 2)
        score = score.view(*query.shape[:3], -1)
        end = (torch.arange(moments.shape[1], dtype=torch.int64, device=query.device) + 1) * self.BLOCK
        known = self.tiles.by_list(self.tiles.known)[:, part]
        score.masked_fill_((end > known[..., None])[:, :, None], -torch.inf)
        # in float64, so that hidden blocks do not change the rounded result: a chunk may see more or fewer blocks
        total = score.double().logsumexp(-1).to(score.dtype)
        least = torch.finfo(score.dtype).min
        return torch.nan_to_num_(total, nan=least, neginf=least).add_(log(self.BLOCK))

    def _best(self, one: int, some: slice, count: int, seen: Tensor) -> Tensor:
        """Find the logarithms of the largest shares for a few tiles of one list, ``[tiles, count]``."""
        if self.precise is None or self.floats is None or self.precise[one, some].all():
            return self._log_shares(one, some, count, seen)
        floats, precise = self.floats._log_shares(one, some, count, seen), self.precise[one, some]
        # all tiles of the chunk in both ways, so that no size depends on values
        return torch.where(precise[:, None], self._log_shares(one, some, count, seen), floats) if precise.any() else floats

    def _log_shares(self, one: int, some: slice, count: int, seen: Tensor) -> Tensor:
        """Find the same with one kind of numbers."""
        query, unit = self.query[one, some], self.unit[one, some]
        score = self.scores.take(query.shape[:3].numel(), count)
        # the operator behind torch._int_mm, which has no other name in torch
        multiply = torch.ops.aten.mm.out if score.dtype.is_floating_point else torch.ops.aten._int_mm.out
        multiply(query.flatten(0, 2), self.keys[one, :count].T, out=score)
        score = score.view(*query.shape[:3], count)
        self._hide(score, one, some)
        top = score.amax(-1)
        # a sum of n exponentials is between the largest and n times the largest, so the estimate is clamped to this range
        seen, spread = ((x / unit).clamp(_HIDDEN, -_HIDDEN).to(score.dtype) for x in (seen, self._spread(one, some)))
        bar = torch.minimum(torch.maximum(seen, top), top + spread)
        share = score.sub_(bar[..., None]).amax(2)  # [tiles, group, count]
        return (share.to(unit.dtype) * unit).amax(1)

    def _hide(self, score: Tensor, one: int, some: slice) -> None:
        """Overwrite the scores of keys in or after a tile, which the choice must not depend on."""
        if not self.tiles.problem.causal:
            total = self.tiles.by_list(self.tiles.total)[one]
            if self.tiles.problem.rank is not None:
                score.masked_fill_(torch.arange(score.shape[-1], dtype=torch.int64, device=score.device) >= total, _HIDDEN)
            return
        # masked keys shift the others, so that the position alone is not enough
        first = 0 if self.tiles.problem.rank is not None else max(0, self.tiles.number(some.start) * self.tiles.size)
        if first < score.shape[-1]:
            key = torch.arange(first, score.shape[-1], dtype=torch.int64, device=score.device)
            ahead = key >= self.tiles.by_list(self.tiles.start)[one, some, None]
            score[..., first:].masked_fill_(ahead[:, None, None], _HIDDEN)

    def _spread(self, one: int, some: slice) -> Tensor:
        """Return the logarithm of the number of keys that a tile sees, ``[tiles, 1, 1]``."""
        return self.tiles.by_list(self.tiles.visible_end)[one, some, None, None].clamp(min=1).to(self.unit.dtype).log()


def _moments(keys: Tensor) -> Float[Tensor, "lists blocks moments"]:
    """Average keys and their squares over complete blocks: means, then variances."""
    blocks = keys[:, : keys.shape[1] // Scan.BLOCK * Scan.BLOCK].unflatten(1, (-1, Scan.BLOCK))
    mean = blocks.mean(2)
    return torch.cat([mean, (blocks.square().mean(2) - mean.square()).clamp_(min=0)], 2)
