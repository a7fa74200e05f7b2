"""Chunks of queries that read their own keys by a method, and of all other keys a few that they share: the pool."""

from dataclasses import dataclass, field, replace
from math import gcd

import torch
from torch import Tensor

from hyperattention.check import instance, positive
from hyperattention.methods.base import AttentionMethod, Cost, exact_pairs, refuse_spans
from hyperattention.methods.method import Method
from hyperattention.methods.pooled_reader import Reader, near_route
from hyperattention.pooled.choose import choose
from hyperattention.pooled.layout import Grid, Layout, cut
from hyperattention.pooled.pool import Near, Shard, Sizes
from hyperattention.pooled.route import Alone
from hyperattention.problem import Problem
from hyperattention.select.draw_alike import DrawAlike
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window
from hyperattention.select.stage import LookAhead
from hyperattention.transforms import refuse_transforms
from hyperattention.types import Partial

# positions in a block of averaged queries
_BLOCK = 1024


def _usual() -> Method:
    return Method(Sinks(16), Window(192), DrawAlike(640, pooled=16), tile=128)


@dataclass(frozen=True)
class PooledChunks(AttentionMethod):
    """Read the keys of a query's own chunk by a method, and of all other keys `num` that the whole chunk shares.

    p_j ~ min(1, max_g n_g^(1/2) exp(q_g . k_j - z_g)):   q_g is the average of n_g alike queries of a block, z_g
    the logarithm of its sum over all keys, also those near. Keys of the largest shares are listed for certain.

    Queries are alike if keys score them alike, and groups form around those farthest from one another: a query that looks
    for a key of its own stands alone, as long as there are more averages in a block than such queries.

    Made for a sequence that several machines hold (`hyperattention.distributed`): a chunk of queries sends its averages to
    the owners of other keys, and gets `num` keys with values and weights, however long the sequence is. The estimator does
    not depend on who holds what: one machine draws the same keys.

    Source: Han et al., 2023 (arXiv:2310.05869), its idea; Hansen and Hurwitz, 1943, sampling in proportion to size; Madow,
    1949, evenly spaced points; Gonzalez, 1985, centres far from one another. Differs: two levels, of which the first is
    drawn once for a chunk of thousands of queries.
    Cost: the slots of `local` and `num` more; choosing takes 2 * averages / chunk products a query for each key outside the
    chunk, and at most half as many for each near key.
    Guarantee: numerator and denominator unbiased, whatever the averages say; a key that a single query of the chunk needs
    is drawn seldom where an average hides this query.

    Args:
        local: the method over the keys of the chunk.
        chunk: positions in a chunk, a multiple of the tile of `local`; on several machines, what each of them holds.
        num: keys in the pool of each chunk and kv head.
        averages: averaged groups of a chunk's queries, equally many in each block. On several machines each is sent to
            the owners of keys outside its chunk (of earlier ones, if causal), in head_dim + 4 bytes.
        near: keys before a chunk that its queries read as if they were in it, a multiple of the tile; at least a window.
        sinks: leading keys that every pool holds.
        uniform_share: share of the draws that is spread evenly.
        block: positions of queries that are grouped together, a multiple of the tile of `local` that divides `chunk`; None
            for 1,024 or the tile, whichever is longer, or less where that does not divide the chunk. Tokens of a block are
            brought to one machine.

    Raises:
        TypeError: if `local` is no list of stages.
        ValueError: if a size does not fit, or `local` chooses by tokens beyond a tile.

    Example:
        >>> PooledChunks(chunk=4096, num=1024).cost(131_072).pairs
        2000.0
    """

    local: Method = field(default_factory=_usual)
    chunk: int = 16_384
    num: int = 2048
    averages: int = 2048
    near: int = 256
    sinks: int = 16
    uniform_share: float = 0.1
    block: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments against each other."""
        positive("PooledChunks", chunk=self.chunk, num=self.num, averages=self.averages, near=self.near, sinks=self.sinks)
        instance("PooledChunks", Method, "Method(Sinks(16), Window(192), Draw(640))", local=self.local)
        if self.chunk % self.local.tile or self.near % self.local.tile:
            raise ValueError(
                f"PooledChunks(chunk={self.chunk}, near={self.near}): both must be multiples of the tile of local, "
                f"{self.local.tile}"
            )
        if self.positions < 1 or self.positions % self.local.tile or self.chunk % self.positions:
            raise ValueError(
                f"PooledChunks(block={self.block}, chunk={self.chunk}): a block must be a multiple of the tile of local, "
                f"{self.local.tile}, and divide the chunk"
            )
        if self.local.looks_ahead > LookAhead.TILE:
            raise ValueError(
                f"PooledChunks(local={self.local!r}): it chooses by all tokens of a sequence, of which a chunk is a part: "
                "use stages that look at their own tile and earlier tokens"
            )
        if self.sinks >= self.num:
            raise ValueError(
                f"PooledChunks(num={self.num}, sinks={self.sinks}): the pool must have room for more than sinks"
            )
        if not 0.0 < self.uniform_share < 1.0:
            raise ValueError(
                f"PooledChunks(uniform_share={self.uniform_share}): it must lie between 0 and 1 to bound the weights"
            )

    @property
    def complete(self) -> bool:
        """Whether every visible key has an expected weight of one: the pool's keys have."""
        return self.local.complete

    @property
    def looks_ahead(self) -> LookAhead:
        """A pool depends on all queries of its chunk."""
        return LookAhead.SEQUENCE

    @property
    def follows_masks(self) -> bool:
        """True: chunks are cut by position."""
        return True

    @property
    def positions(self) -> int:
        """Positions of queries that are grouped together."""
        if self.block is not None:
            return self.block
        tile = self.local.tile
        return tile * gcd(self.chunk // tile, max(1, _BLOCK // tile))

    @property
    def sizes(self) -> Sizes:
        """The sizes of pools."""
        groups = -(-self.averages // (self.chunk // self.positions))
        return Sizes(self.num, groups, self.sinks, self.uniform_share)

    def grid(self, num_keys: int, causal: bool) -> Grid:
        """Return how a sequence is cut into chunks."""
        return Grid(self.chunk, self.near, self.positions, num_keys, causal)

    def attend(self, problem: Problem) -> Partial:
        """Draw the pools, and attend chunk by chunk.

        Args:
            problem: the problem.

        Returns:
            rows and the logs of their sums of weights.

        Raises:
            NotImplementedError: if the keys lie in pages.
        """
        if problem.stored is not None:
            raise NotImplementedError(f"{self!r} does not read keys in pages: use a Method, or keys [batch, heads, keys, _]")
        refuse_spans(self, problem)
        if not problem.num_keys or not problem.q.numel():
            return self.local.attend(problem)
        refuse_transforms("attention by a method", problem.q, problem.k, problem.v)
        problem = _in_place(problem)
        world, count = Alone(), problem.num_keys
        ends = (0, problem.offset, problem.offset + problem.num_queries, 0)
        layout = Layout(self.grid(count, problem.causal), cut([(0, 0, count, 0)], self.chunk), cut([ends], self.chunk))
        rows = torch.cat([problem.k, problem.v], 3).flatten(0, 2)
        batch, kv_heads, _, head_dim = problem.k.shape
        route = near_route(world, layout, batch * kv_heads, problem.device)
        near, live = world.move(route, rows).view(batch, kv_heads, -1, rows.shape[1]), None
        if problem.key_mask is not None:
            masks = near_route(world, layout, batch, problem.device)
            live = world.move(masks, problem.key_mask.reshape(-1, 1)).view(batch, -1)
        choice, pool = None, None
        if layout.drawing:
            shard = shard_of(problem, layout)
            choice = choose(world, layout, shard, Near(near[..., :head_dim], live), self.sizes)
            pool = world.move(choice.route, rows).view(batch, kv_heads, -1, rows.shape[1])
        return Reader(layout, layout.queries, self.local, problem, choice).attend(problem.q, near, pool, live)

    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Return the cost for as many queries as keys, before running.

        Args:
            num_keys: length of the sequence.
            is_causal: whether queries see only earlier keys.
            head_dim: width of keys, and of values.

        Returns:
            the cost.
        """
        near = min(num_keys, self.chunk + self.near)
        own = self.local.cost(near, is_causal=is_causal, head_dim=head_dim)
        chunks = -(-num_keys // self.chunk)
        far = (num_keys - near) / (2 if is_causal else 1) if chunks > 1 else 0.0
        pool = self.num if chunks > 1 else 0
        averages = self.sizes.groups / self.positions
        # all near keys: an upper bound, since an average counts those that the last query of its block sees
        selection = own.selection_pairs + averages * (2 * far + (near if chunks > 1 else 0))
        memory_bytes = chunks * (own.memory_bytes + 8 * pool * head_dim)
        return Cost(own.pairs + pool, selection, exact_pairs(num_keys, is_causal), memory_bytes, self.complete)


def shard_of(problem: Problem, layout: Layout) -> Shard:
    """Return the tokens of a problem as those of a single rank."""
    live, before = problem.key_mask, None
    if live is not None:
        count = torch.nn.functional.pad(live.long().cumsum(1), (1, 0))
        before = torch.stack([count[:, cell.base] for cell in layout.keys])
    numbers = problem.seed, problem.layer, problem.head_index
    return Shard(problem.q, problem.k, live, before, problem.scale, *numbers)


def _in_place(problem: Problem) -> Problem:
    """Put keys that a mask moved to the front back where they were; what is masked becomes zeros."""
    if problem.rank is not None:
        live = torch.diff(problem.rank, dim=1, prepend=problem.rank.new_zeros(len(problem.rank), 1)) > 0
        place = (problem.rank - 1).clamp(min=0)[:, None, :, None]
        k, v = (x.gather(2, place.expand(-1, x.shape[1], -1, x.shape[3])) for x in (problem.k, problem.v))
        problem = replace(problem, k=k, v=v, rank=None, key_mask=live)
    if problem.key_mask is None:
        return problem
    k, v = (hidden(x, problem.key_mask) for x in (problem.k, problem.v))
    return replace(problem, k=k, v=v)


def hidden(x: Tensor, live: Tensor) -> Tensor:
    """Set keys, or values, that a mask hides to zeros, so that no result depends on them."""
    return x.masked_fill(~live[:, None, :, None], 0.0)
