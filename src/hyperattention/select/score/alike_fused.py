"""Sorting alike queries, scoring keys for them and drawing, as a GPU does it: one kernel for each of these steps."""

from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.kernels.choose.operator import alike_shares, draw_alike
from hyperattention.kernels.choose.operator_alike import (
    alike_bars,
    alike_blocks,
    alike_first,
    factors_keys,
    group_alike,
    key_factors,
    sort_alike,
)
from hyperattention.random import hash_state
from hyperattention.select.alike import DIRECTIONS, POWER_STEPS, AlikeTiles
from hyperattention.select.score import alike_scan
from hyperattention.select.score.alike_scan import DEVIATIONS, HIDDEN, MOST_LOG_VALUE
from hyperattention.select.score.groups import MEAN_STEPS
from hyperattention.select.score.key_metric import GROWTH, RIDGE, KeyMetric
from hyperattention.select.score.precision import dtype_of_estimates
from hyperattention.select.score.principal import ROUNDS
from hyperattention.select.score.stretches import CLIP_ROUNDS, LEAST
from hyperattention.tiling import Tiles


@dataclass(frozen=True)
class FusedBlocks:
    """Blocks of equally many keys: see `alike_scan.Blocks`.

    Args:
        size: keys in a block.
        keys: the mean of each, centred.
        variance: variances inside blocks; none for blocks of one key.
        moments: means beside half the variances of whole stretches of blocks.
        log_value: logarithm of how far values lie from the mean of the first ones, relative to these.
    """

    size: int
    keys: Float[Tensor, "lists blocks width"]
    variance: Tensor
    moments: Float[Tensor, "lists stretches moments"]
    log_value: Float[Tensor, "lists blocks"]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, centres: Tensor, size: int) -> "FusedBlocks":
        """Average keys over blocks, in one launch: see `alike_scan.blocks_of`."""
        dtype = dtype_of_estimates(k.device)
        return cls(size, *alike_blocks(k, v, centres, size, alike_scan.NORMAL, MOST_LOG_VALUE, dtype))


@dataclass(frozen=True)
class FusedSort:
    """Lists of alike queries of all tiles, sorted a part at a time into memory that is asked for once.

    Args:
        tiles: the problem tiled by position.
        alike: the sorted rows; undefined for tiles that are not yet sorted.
        row_limit: leading keys that each row may see.
        begin: directions from which those in which queries differ are sought.
        metric: what queries may be multiplied by before they are compared.
        edges: edges of all tiles, the last of which counts the keys that all of its queries see.
        many: lists of each tile.
        parts: parts of the heads of a group that are sorted apart, each into equally many lists.
    """

    tiles: Tiles
    alike: AlikeTiles
    row_limit: Int[Tensor, "lists tiles rows"]
    begin: Float[Tensor, "head_dim 16"]
    metric: KeyMetric
    edges: Int[Tensor, "lists all_tiles 5"]
    many: int
    parts: int = 1

    @classmethod
    def empty(
        cls, tiles: Tiles, many: int, metric: KeyMetric, begin: Float[Tensor, "head_dim 16"],
        edges: Int[Tensor, "lists _ 5"], parts: int = 1,
    ) -> "FusedSort":  # fmt: skip
        """Ask for the memory; `metric` tells how different queries are to keys."""
        problem = tiles.problem
        rows = -(-tiles.size * problem.group // many)
        shape = (problem.k.shape[0] * problem.k.shape[1], len(tiles.index) * many, rows)
        source, inside, row_limit = (problem.q.new_empty(shape, dtype=torch.int64) for _ in range(3))
        live = problem.q.new_empty(shape, dtype=torch.bool)
        heads = (problem.q.shape[0], problem.q.shape[1], problem.num_queries)
        return cls(tiles, AlikeTiles(source, live, inside, heads), row_limit, begin, metric, edges, many, parts)

    def averages(self, part: slice, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sort the queries of some tiles, and average those of each list in groups, in two launches.

        Args:
            part: which tiles.
            groups: groups of each list.

        Returns:
            `query`, `spread` and `log_rows` as in `alike_scan.AlikeScan`.
        """
        q, scale, rows = self.tiles.problem.q, self.tiles.problem.scale, slice(part.start * self.many, part.stop * self.many)
        results = [x[:, rows] for x in (self.alike.source, self.alike.live, self.alike.inside, self.row_limit)]
        rounds = 2 * ROUNDS if q.shape[3] > DIRECTIONS else 0
        given = q, self.begin, self.metric.factor, self.edges[:, part], self.tiles.limit
        many, first = self.many // self.parts, self.metric.first
        numbers = part.start, self.tiles.front, many, first, GROWTH, scale, rounds, POWER_STEPS
        directions = sort_alike(*given, *results, *numbers)
        query, *rest = group_alike(q, results[0], directions, groups, scale, MEAN_STEPS, dtype_of_estimates(q.device))
        # lists of all parts of a tile are its lists
        spread, log_rows = (x.view(len(x), -1, self.many, x.shape[3]) for x in rest)
        return query.view(len(query), -1, self.many, *query.shape[3:]), spread, log_rows


def fused_metric(k: Tensor, centres: Tensor, first: int) -> KeyMetric:
    """Factor covariances as `KeyMetric.of` does, in two launches; `centres` begin with the mean of the first keys."""
    if not factors_keys(k.shape[2]):
        return KeyMetric.of(k, first)
    return KeyMetric(key_factors(k, centres, first, GROWTH, RIDGE), first)


def fused_first(k: Tensor, v: Tensor, num: int, tiles: Tiles, many: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Average the first keys and values, and draw, in one launch: see `operator_alike.alike_first`.

    Args:
        k: keys, ``[lists, keys, width]``.
        v: their values.
        num: keys that are averaged.
        tiles: the problem tiled by position.
        many: lists of each tile.

    Returns:
        the averages; what `select.alike.first_directions` draws, or the axes where a query has no more numbers than
        directions; where inside a slot the points of each list of queries lie; numbers of the lists.
    """
    problem = tiles.problem
    states = int(hash_state(())), int(hash_state((problem.seed, problem.layer)))
    heads = None if problem.heads is None else problem.head_index
    return alike_first(k, v, num, tiles.index, many, heads, problem.k.shape[1], states)


def fused_shares(
    averages: tuple[Tensor, Tensor, Tensor], blocks: FusedBlocks, edges: Int[Tensor, "lists chunk 5"], num: int
) -> Tensor:
    """Estimate what `AlikeScan.shares` does, in two launches.

    Args:
        averages: from `FusedSort.averages`.
        blocks: the keys.
        edges: edges of each tile, the last of which counts the keys that it may score.
        num: a bound of the blocks that a tile may score.

    Returns:
        shares of the leading blocks, ``[lists, chunk * many, at least num]``, undefined from those on that a tile knows.
    """
    query, spread, log_rows = averages
    normal = alike_scan.NORMAL
    bar = alike_bars(query, log_rows, blocks.moments, edges, blocks.size, normal, log(normal * blocks.size), -HIDDEN)
    variance = None if blocks.size == 1 else blocks.variance
    return alike_shares(query, bar, spread, blocks.keys, variance, blocks.log_value, edges, blocks.size, num, DEVIATIONS)


def fused_draws(
    share: Tensor,
    size: int,
    edges: Int[Tensor, "lists chunk 5"],
    noise: Float[Tensor, "lists rows"],
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    even: float,
) -> None:
    """Draw from the law of `stretches_of`, or list all keys where they are few, in one launch.

    Args:
        share: from `fused_shares`.
        size: keys in a block.
        edges: begin, hole begin, hole end and end of what earlier stages left for each tile, and the number of keys that it
            may score.
        noise: where inside a slot each list's points lie.
        results: keys and their log-weights, to be written, ``[lists, rows, num]``; begin and end of what is left,
            ``[lists, rows]``.
        even: share of the draws that is spread evenly over the keys.
    """
    draw_alike(share, edges, noise, *results, size, even, CLIP_ROUNDS, LEAST)


def fused_numbers(blocks: int, many: int, pooled: int, width: int, device: torch.device) -> int:
    """Count the numbers of four bytes held for each tile and list of keys while its draws are made.

    Args:
        blocks: blocks that a tile may score at most.
        many: lists of each tile.
        pooled: groups of each list.
        width: numbers in a query.
        device: where they are held.

    Returns:
        their number, the result left out.
    """
    # a row of shares has a multiple of 16 places; averages, and what they leave out
    estimates = many * (-(-blocks // 16) * 16 + (pooled + 2) * width)
    # bars, relative numbers of rows; directions
    return -(-estimates * dtype_of_estimates(device).itemsize // 4) + 2 * many * pooled + DIRECTIONS * width
