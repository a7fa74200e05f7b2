"""Draws by hash collisions: keys with the same hash as a tile's mean query, weighted by the collision probability."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.random import normal, uniform
from hyperattention.select.score.keys_left import key_runs, keys_left
from hyperattention.select.score.pooling import chunks, edges, pool_queries
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage
from hyperattention.tiling import Tiles
from hyperattention.types import Runs

# extra counters after the five of every draw, so that hyperplanes and the choice among candidates share no bits with draws
_PLANES, _STREAM = 6, 7
# codes are int16
_MOST_BITS = 15


@dataclass(frozen=True)
class _Hashed:
    """The hash tables, and the vectors that were hashed."""

    query: Tensor  # [lists, tiles, head_dim], the mean query of each tile
    key: Tensor  # [lists, keys, head_dim], centred
    query_code: Tensor  # [lists, tables, tiles]
    key_code: Tensor  # [lists, tables, keys]


@dataclass(frozen=True)
class CollisionDraw(Stage):
    """Draw the keys that collide with the tile's mean query in at least two hash tables, weighted by that probability.

    w_j = 1 - (1 - p_j^K)^L - L p_j^K (1 - p_j^K)^(L-1),   p_j = 1 - angle(q, k_j - mean) / pi,   K bits, L tables;
    weight_j = max(1, C / num) / w_j,   C the number of keys that collide

    Keys in the direction of the query collide with a high probability: they are listed often, with a small weight.
    Source: Chen et al., 2024 (arXiv:2410.16179), MagicPIG.   Differs: one hash per tile, of its mean query, where the paper
    hashes every query of a decoder; at most `num` of the colliding keys are kept, evenly spaced from a random start; keys
    are centred by the mean of the first keys, so that no tile looks ahead; no constant is added to w_j, so that the weights
    are unbiased.
    Cost: `num` slots per query, `bits` * `tables` products per key, and a comparison for every table, tile and key:
    quadratic in the length.   Guarantee: E[weight of a key] = 1 for every remaining key, over the random hyperplanes.

    Args:
        num: largest number of keys listed for each tile.
        bits: number of random hyperplanes per table, at most 15.
        tables: number of hash tables, at least 2.

    Raises:
        ValueError: if a number is not positive, `bits` is above 15, or `tables` is 1.
    """

    num: int
    bits: int = 8
    tables: int = 150

    def __post_init__(self) -> None:
        positive("CollisionDraw", num=self.num, bits=self.bits, tables=self.tables)
        if self.bits > _MOST_BITS:
            raise ValueError(f"CollisionDraw(bits={self.bits}): codes are 16-bit integers; use at most {_MOST_BITS} bits")
        if self.tables < 2:
            raise ValueError(f"CollisionDraw(tables={self.tables}): a key must collide twice to be listed; use 2 or more")

    @property
    def complete(self) -> bool:
        """True: every remaining key has an expected weight of one."""
        return True

    @property
    def tells_error(self) -> bool:
        """False: slots are not strata, from whose differences an error could be estimated."""
        return False

    @property
    def looks_ahead(self) -> LookAhead:
        """Draws of a tile depend on all of its queries."""
        return LookAhead.TILE

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile, empty slots included."""
        return self.num

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count projections of a key and of a tile's query, and the angles of listed keys; comparisons are not counted."""
        return self.bits * self.tables * (1.0 + 1.0 / tile) + self.num / tile

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Hash, compare, and list the keys that collide; list all remaining keys if they are few."""
        problem = tiles.problem
        if not problem.k.shape[0] * problem.num_keys * len(tiles.index):
            return (), covered
        hashed, left = self._hash(tiles, covered), edges(tiles, covered)
        parts = chunks(tiles, 8 * problem.num_keys + self.num * (problem.k.shape[3] + 8))
        drawn = [self._draw(tiles, hashed, keys_left(tiles, covered, left, part), part) for part in parts]
        index, log_weight = (torch.cat(x, 1) for x in zip(*drawn, strict=True))
        return (key_runs(tiles, covered, index, log_weight),), covered

    def _hash(self, tiles: Tiles, covered: CoveredKeys) -> _Hashed:
        problem, device = tiles.problem, tiles.problem.device
        query = pool_queries(tiles, 1, 1.0).mean(2)
        k = problem.k.to(query.dtype)
        # a tile that sees no more keys lists all of them: every other tile may read these keys
        centred = k - k[:, :, covered.prefix : covered.prefix + self.num].mean(2, keepdim=True)
        head = problem.head_index[:, None, None]
        axis, bit = (
            torch.arange(k.shape[3], dtype=torch.int64, device=device)[:, None],
            torch.arange(self.bits, dtype=torch.int64, device=device),
        )
        grouped, codes = query.unflatten(0, k.shape[:2]), []
        for table in range(self.tables):
            counters = (problem.seed, problem.layer, head, axis, table * self.bits + bit, _PLANES)
            planes = normal(counters, device).to(k.dtype)  # [kv_heads, head_dim, bits]
            codes.append([_code(x @ planes).flatten(0, 1) for x in (grouped, centred)])
        query_code, key_code = (torch.stack(x, 1) for x in zip(*codes, strict=True))
        return _Hashed(query, centred.flatten(0, 1), query_code, key_code)

    def _draw(self, tiles: Tiles, hashed: _Hashed, free: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """List keys of a chunk: keys and log-weights, ``[lists, chunk, num]``."""
        problem = tiles.problem
        few = free.sum(-1, keepdim=True) <= self.num
        listed = free & ((self._collisions(hashed, part, free) >= 2) | few)
        running = listed.cumsum(-1)
        count = running[..., -1:]
        slot = torch.arange(self.num, dtype=torch.int64, device=free.device)
        head = problem.head_index[:, None, None]
        start = uniform((problem.seed, problem.layer, head, tiles.index[part, None], 0, _STREAM), free.device)
        spaced = ((slot + start.repeat(problem.k.shape[0], 1, 1)) * (count.float() / self.num).double()).long()
        rank = torch.where(count > self.num, torch.minimum(spaced, count - 1), slot.expand(spaced.shape))
        index = torch.searchsorted(running, rank + 1).clamp(max=free.shape[2] - 1)
        row = index + torch.arange(len(index), dtype=torch.int64, device=index.device)[:, None, None] * hashed.key.shape[1]
        key = hashed.key.flatten(0, 1).index_select(0, row.flatten()).view(*index.shape, -1)
        cosine = torch.cosine_similarity(key, hashed.query[:, part, None], dim=-1).double()
        chance = twice(1.0 - torch.nan_to_num(cosine, nan=0.0).clamp(-1.0, 1.0).acos() / math.pi, self.bits, self.tables)
        log_weight = (count.float() / self.num).double().clamp(min=1.0).log() - chance.log()
        return index, log_weight.masked_fill(few, 0.0).masked_fill(slot >= count, -torch.inf)

    def _collisions(self, hashed: _Hashed, part: slice, free: Tensor) -> Tensor:
        """Count the tables in which keys collide with a chunk of tiles: ``[lists, chunk, seen]``."""
        count = torch.zeros(free.shape, dtype=torch.int16, device=free.device)
        for table in range(self.tables):
            count += hashed.query_code[:, table, part, None] == hashed.key_code[:, table, None, : free.shape[2]]
        return count


def twice(p: Tensor, bits: int, tables: int) -> Tensor:
    """Return the probability of a collision in two or more tables, from the probability `p` that one bit agrees; float64.

    1 - (1 - x)^L - L x (1 - x)^(L-1) = 1 - (1 - x)^(L-1) (1 + (L-1) x),   x = p^bits: without cancellation for small x

    Args:
        p: probabilities that one bit agrees.
        bits: bits of a table.
        tables: number of tables.

    Returns:
        probabilities above 0.
    """
    x = p**bits
    log_miss = (tables - 1) * torch.log1p(-x) + torch.log1p((tables - 1) * x)
    # x = 1 gives a log of -inf, which means a certain collision
    return (-torch.expm1(log_miss)).clamp(min=torch.finfo(torch.float64).tiny)


def _code(projected: Tensor) -> Tensor:
    """Convert the signs of the last axis to an integer code."""
    weight = 2 ** torch.arange(projected.shape[-1], dtype=torch.int64, device=projected.device)
    return ((projected > 0) * weight).sum(-1).to(torch.int16)
