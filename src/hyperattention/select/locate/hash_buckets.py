"""Buckets of queries and keys with similar direction: sorted by a hash of the direction, then cut into equal blocks."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.check import positive
from hyperattention.problem import Problem
from hyperattention.random import normal
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage, Tiling
from hyperattention.tiling import Tiles
from hyperattention.types import Labels, Partial, Runs, Selection

# codes are int64, and one value above all codes marks masked keys
MOST_BITS = 62


def gray_rank(code: Int[Tensor, "*any"], bits: int) -> Int[Tensor, "*any"]:
    """Return the rank of each code in the reflected Gray order, in which neighbours differ in a single bit.

    rank = code ^ (code >> 1) ^ (code >> 2) ^ ...,   the inverse of Gray(rank) = rank ^ (rank >> 1)

    Args:
        code: codes of `bits` bits.
        bits: bits in a code.

    Returns:
        their ranks.
    """
    shift = 1
    while shift < bits:
        code = code ^ (code >> shift)
        shift *= 2
    return code


@dataclass(frozen=True)
class SortedTiles:
    """Tiles of queries that are neighbours in some order, one set of tiles for each query head.

    Args:
        source: index of the query in each row of each tile; padding rows repeat one query.
        place: row of each query, counted over all tiles.
        live: which rows are not padding.
    """

    source: Int[Tensor, "batch heads tiles rows"]
    place: Int[Tensor, "batch heads queries"]
    live: Tensor

    def arrange(self, x: Float[Tensor, "batch heads queries width"]) -> Float[Tensor, "lists tiles rows width"]:
        """Sort rows into tiles."""
        index = self.source.flatten(2)[..., None].expand(*(-1,) * 3, x.shape[-1])
        return x.gather(2, index).unflatten(2, self.source.shape[2:]).flatten(0, 1)

    def restore(self, x: Tensor) -> Tensor:
        """Undo `arrange`, for rows of any width."""
        x = x.flatten(1, 2).unflatten(0, self.place.shape[:2])
        index = self.place.view(*self.place.shape, *(1,) * (x.ndim - 3)).expand(*self.place.shape, *x.shape[3:])
        return x.gather(2, index)

    def split(self, x: Float[Tensor, "batch heads queries width"]) -> Float[Tensor, "lists tiles 1 rows width"]:
        """Sort rows into tiles, each with rows of one query head only."""
        return self.arrange(x)[:, :, None]

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`."""
        return self.restore(x[:, :, 0])

    def beside(self, earlier: tuple[Partial, ...], out: Tensor, lse: Tensor) -> tuple[Partial, ...]:
        """Undo `split` for attention over the lists, and put it behind what is to be merged with it."""
        return *earlier, Partial(self.join(out), self.join(lse))

    def take(self, x: Int[Tensor, "#batch #heads queries"]) -> Int[Tensor, "lists tiles rows"]:
        """Read the number of each row's query; 0 for padding."""
        x = x.expand(*self.place.shape).gather(2, self.source.flatten(2)).view_as(self.source)
        return x.masked_fill(~self.live, 0).flatten(0, 1)


@dataclass(frozen=True)
class HashBuckets(Stage):
    """Take the keys whose direction has a hash close to the query's: their scores are likely to be large.

    code(x) = sign bits of (x - mean) G,   G ~ N(0, 1)^(head_dim x bits);   keys and queries are sorted by the Gray rank of
    their codes, and both orders are cut into the same number of equal blocks; a query attends to the keys of its block.
    Source: Han et al., 2023 (arXiv:2310.05869), Alg. 1, sortLSH.   Differs: the true Gray order (the published code sorts by
    Gray(code) where the order is its inverse), centred queries and keys, separate projections for each kv head, masked keys
    sorted last and left out, and bucket sizes that differ by at most one key at every length.
    Cost: `bucket_size` slots per query, 2 * bits products, a sort.   Guarantee: exact on the pairs taken; which pairs are
    taken depends on random hyperplanes, so a Draw should follow.

    The sort and the means use the entire sequence, so the lists of early queries depend on later tokens: `looks_ahead`. Only
    stages that take ranges of positions (Sinks, Window) can come before it, because only for these one comparison shows
    whether a pair was taken.

    Args:
        bucket_size: largest number of keys in a bucket.
        bits: number of random hyperplanes, at most 62.

    Raises:
        ValueError: if a size is not positive, or `bits` is above 62.
    """

    bucket_size: int
    bits: int = 7

    def __post_init__(self) -> None:
        """Check the sizes."""
        positive("HashBuckets", bucket_size=self.bucket_size, bits=self.bits)
        if self.bits > MOST_BITS:
            raise ValueError(f"HashBuckets(bits={self.bits}): codes are 64-bit integers; use at most {MOST_BITS} bits")

    @property
    def looks_ahead(self) -> LookAhead:
        """Sorting and centring read the entire sequence."""
        return LookAhead.SEQUENCE

    @property
    def reorders(self) -> bool:
        """True: sorted tiles are a separate tiling."""
        return True

    def check_after(self, earlier: tuple[Stage, ...]) -> None:
        """Check that all earlier stages are Sinks or Window.

        Args:
            earlier: the stages before this one.

        Raises:
            ValueError: if an earlier stage takes keys for which sorted tiles have no test.
        """
        for stage in earlier:
            if not isinstance(stage, Sinks | Window):
                raise ValueError(
                    f"{self!r} cannot follow {stage!r}: its tiles are sorted by hash, and can skip only ranges of "
                    "positions (Sinks, Window) of earlier stages, so keys would count twice; put a single "
                    "HashBuckets right after Sinks and Window, before TopBlocks and Draw"
                )

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile."""
        return self.bucket_size

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count the projections of a query and of a key."""
        return 2.0 * self.bits

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Take no keys in tiles of positions."""
        return (), covered

    def select_apart(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[tuple[Tiling, Selection], ...], CoveredKeys]:
        """Hash, sort, cut, and list each bucket's keys for its queries.

        Args:
            tiles: the problem tiled by position.
            covered: ranges of positions of earlier stages.

        Returns:
            the sorted tiles with their lists, and the labels by which later stages recognise the pairs.
        """
        problem = tiles.problem
        if not problem.num_keys or not problem.num_queries:
            return (), covered
        num = -(-problem.num_keys // self.bucket_size)
        total = tiles.total.expand(problem.k.shape[0], 1)
        query_rank, key_rank = self._ranks(problem, total)
        query_order, key_order = query_rank.argsort(dim=-1, stable=True), key_rank.argsort(dim=-1, stable=True)
        query_edge = _edges(query_order.new_full((1, 1), problem.num_queries), num)[0, 0]
        key_edge = _edges(total, num)  # [batch, 1, buckets + 1]
        sorted_tiles, query_label = _sorted_tiles(query_order, query_edge, -(-problem.num_queries // num))
        slot = torch.arange(self.bucket_size, dtype=torch.int64, device=problem.device)
        rank = key_edge[..., :-1, None] + slot  # [batch, 1, buckets, slots]
        empty = (rank >= key_edge[..., 1:, None]).expand(-1, problem.k.shape[1], -1, -1)
        rank = rank.clamp(max=problem.num_keys - 1).expand_as(empty)
        first = key_order.gather(2, rank.flatten(2)).view_as(rank)
        selection = _bucket_lists(tiles, covered, sorted_tiles, first, empty)
        each = torch.arange(problem.num_keys, dtype=torch.int64, device=problem.device).expand(len(key_edge), -1)
        block = torch.searchsorted(key_edge[:, 0, 1:].contiguous(), each.contiguous(), right=True)
        key_label = torch.empty_like(key_order).scatter_(2, key_order, block[:, None].expand_as(key_order))
        return ((sorted_tiles, selection),), replace(covered, labels=Labels(query_label, key_label))

    def _ranks(self, problem: Problem, total: Tensor) -> tuple[Tensor, Tensor]:
        """Return Gray ranks: queries ``[batch, heads, queries]``, keys ``[batch, kv_heads, keys]`` with masked keys last."""
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (problem.q, problem.k))
        device, (kv_heads, num_keys, head_dim) = problem.device, k.shape[1:]
        # the sixth counter makes projections independent of draws, which have five counters
        head = problem.head_index[:, None, None]
        axis, bit = (
            torch.arange(head_dim, dtype=torch.int64, device=device)[:, None],
            torch.arange(self.bits, dtype=torch.int64, device=device),
        )
        planes = normal((problem.seed, problem.layer, head, axis, bit, 1), device).to(k.dtype)  # [kv_heads, head_dim, bits]
        dead = (torch.arange(num_keys, dtype=torch.int64, device=device) >= total)[:, None, :, None]
        mean = k.masked_fill(dead, 0.0).sum(2, keepdim=True) / total.clamp(min=1)[:, :, None, None]
        key_rank = self._gray((k - mean) @ planes)
        key_rank = key_rank.masked_fill(dead[..., 0], 2**self.bits)
        grouped = (q - q.mean(2, keepdim=True)).unflatten(1, (kv_heads, problem.group))
        return self._gray(grouped @ planes[:, None]).flatten(1, 2), key_rank

    def _gray(self, projected: Float[Tensor, "*rest bits"]) -> Int[Tensor, "*rest"]:
        weight = 2 ** torch.arange(self.bits, dtype=torch.int64, device=projected.device)
        return gray_rank(((projected > 0) * weight).sum(-1), self.bits)


def _edges(count: Int[Tensor, "batch 1"], num: int) -> Int[Tensor, "batch 1 edges"]:
    """Cut `count` ranks into `num` blocks whose sizes differ by at most one: return their first ranks, and the end."""
    part = torch.arange(num + 1, dtype=torch.int64, device=count.device)
    return -((-count[..., None] * part) // num)


def _sorted_tiles(
    order: Int[Tensor, "batch heads queries"], edge: Int[Tensor, " edges"], rows: int
) -> tuple[SortedTiles, Int[Tensor, "batch heads queries"]]:
    """Make one tile from each block of sorted queries, and label every query with its block."""
    rank = edge[:-1, None] + torch.arange(rows, dtype=torch.int64, device=order.device)  # [tiles, rows]
    live = rank < edge[1:, None]
    source = order[:, :, rank.clamp(max=order.shape[2] - 1)]
    each = torch.arange(order.shape[2], dtype=torch.int64, device=order.device)
    block = torch.searchsorted(edge[1:].contiguous(), each, right=True)
    place, label = (
        torch.empty_like(order).scatter_(2, order, x.expand_as(order)) for x in (block * rows + each - edge[block], block)
    )
    return SortedTiles(source, place, live), label


def _bucket_lists(tiles: Tiles, covered: CoveredKeys, by_hash: SortedTiles, first: Tensor, empty: Tensor) -> Selection:
    """List the keys of each bucket, in runs of one key, without the keys that sinks and window took."""
    problem = tiles.problem
    (batch, kv_heads, num, _), group = first.shape, problem.group
    device = first.device
    first, weight = (
        x[:, :, None].expand(-1, -1, group, -1, -1).flatten(0, 2)
        for x in (first, torch.zeros(empty.shape, dtype=torch.float32, device=device).masked_fill(empty, -torch.inf))
    )
    high = tiles.total[:, :, None].expand(batch, kv_heads * group, num).flatten(0, 1)
    position = torch.arange(problem.num_queries, dtype=torch.int64, device=device) + problem.offset
    limit = problem.live_before(position + 1) if problem.causal else tiles.total.expand(-1, problem.num_queries)
    gap = None
    if covered.gap is not None:
        tile = position // tiles.size - problem.offset // tiles.size
        gap = by_hash.take(covered.gap[0][:, None, tile]), by_hash.take(covered.gap[1][:, None, tile])
    lists = torch.arange(batch * kv_heads, dtype=torch.int64, device=device)
    return Selection(
        runs=(Runs(first, 1, weight, low=torch.full_like(high, covered.prefix), high=high, causal=problem.causal),),
        row_limit=by_hash.take(limit[:, None]),
        key_row=lists.repeat_interleave(group),
        row_gap=gap,
    )
