"""Sorting alike queries, scoring keys for them and drawing, as a GPU does it: one kernel for each of these steps."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.kernels.choose.alike_plan import AlikePlan
from hyperattention.kernels.choose.operator_alike import (
    alike_blocks,
    alike_first,
    choose_alike,
    key_factors,
    sort_alike,
)
from hyperattention.problem import Problem
from hyperattention.random import hash_state
from hyperattention.select.alike import DIRECTIONS, POWER_STEPS, AlikeTiles
from hyperattention.select.score.alike_scan import DEVIATIONS, WIDER
from hyperattention.select.score.block_sizes import BlockSizes
from hyperattention.select.score.candidates import CLIP_ROUNDS, LEAST
from hyperattention.select.score.groups import MEAN_STEPS
from hyperattention.select.score.key_blocks import MOST_LOG_VALUE
from hyperattention.select.score.key_metric import GROWTH, RIDGE, KeyMetric
from hyperattention.select.score.precision import dtype_of_estimates
from hyperattention.select.score.principal import ROUNDS
from hyperattention.tiling import Tiles

# bound of what scores are compared with
BOUND = float(2**29)


@dataclass(frozen=True)
class FusedBlocks:
    """Blocks of one key, of 4, of 16, and so on, the smallest first: see `key_blocks.KeyBlocks`.

    Args:
        keys: the mean of each, centred.
        variance: variances inside blocks, from those of 4 keys on.
        log_value: logarithm of how far values lie from the mean of the first ones, relative to these.
    """

    keys: Float[Tensor, "lists blocks width"]
    variance: Float[Tensor, "lists larger width"]
    log_value: Float[Tensor, "lists blocks"]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, centres: Tensor, plan: AlikePlan) -> "FusedBlocks":
        """Average keys over blocks, in one launch: see `key_blocks.blocks_of`."""
        return cls(*alike_blocks(k, v, centres, plan.levels, MOST_LOG_VALUE, dtype_of_estimates(k.device)))


@dataclass(frozen=True)
class FusedSort:
    """Lists of alike queries of all tiles.

    Args:
        alike: the sorted rows.
        row_limit: leading keys that each row may see.
        directions: those in which the rows of each part of a tile were compared.
    """

    alike: AlikeTiles
    row_limit: Int[Tensor, "lists rows each"]
    directions: Float[Tensor, "lists parts 16 head_dim"]

    @classmethod
    def of(
        cls, tiles: Tiles, many: int, metric: KeyMetric, begin: Float[Tensor, "head_dim 16"],
        edges: Int[Tensor, "lists _ 5"], parts: int = 1,
    ) -> "FusedSort":  # fmt: skip
        """Sort the queries of all tiles, in one launch.

        Args:
            tiles: the problem tiled by position.
            many: lists of each tile.
            metric: what queries may be multiplied by before they are compared.
            begin: directions from which those in which queries differ are sought.
            edges: edges of all tiles, the last of which counts the keys that all of its queries see.
            parts: parts of the heads of a group that are sorted apart, each into equally many lists.

        Returns:
            the lists.
        """
        problem = tiles.problem
        rows = -(-tiles.size * problem.group // many)
        shape = (problem.k.shape[0] * problem.k.shape[1], len(tiles.index) * many, rows)
        source, inside, row_limit = (problem.q.new_empty(shape, dtype=torch.int64) for _ in range(3))
        live = problem.q.new_empty(shape, dtype=torch.bool)
        rounds = 2 * ROUNDS if problem.q.shape[3] > DIRECTIONS else 0
        given = problem.q, begin, metric.factor, edges, tiles.limit, source, live, inside, row_limit
        numbers = 0, tiles.front, many // parts, metric.first, GROWTH, problem.scale, rounds, POWER_STEPS
        heads = (problem.q.shape[0], problem.q.shape[1], problem.num_queries)
        return cls(AlikeTiles(source, live, inside, heads), row_limit, sort_alike(*given, *numbers))


def fused_metric(k: Tensor, centres: Tensor, first: int) -> KeyMetric:
    """Factor covariances as `KeyMetric.of` does, in two launches; `centres` begin with the mean of the first keys."""
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


def fused_plan(tiles: Tiles, sizes: BlockSizes, many: int, groups: int, candidates: int, parts: int = 1) -> AlikePlan:
    """Tell kernels how a choice is cut.

    Args:
        tiles: the problem tiled by position.
        sizes: of blocks.
        many: lists of each tile.
        groups: averages of a list.
        candidates: keys that lists score at last, where blocks are opened.
        parts: parts of the heads of a group, whose lists are sorted apart.

    Returns:
        numbers that the host knows.
    """
    problem = tiles.problem
    length, step = (len(tiles.index),) * 2 if problem.spans is None else (x // tiles.size for x in problem.spans)
    return AlikePlan(
        tiles.size, tiles.number(0), length, step, problem.num_keys, sizes.most, len(sizes.all(tiles)), many, groups,
        MEAN_STEPS, CLIP_ROUNDS, candidates, WIDER, parts,
    )  # fmt: skip


def fused_choice(
    problem: Problem, ordered: FusedSort, edges: Int[Tensor, "lists tiles 5"], noise: Float[Tensor, "lists rows"],
    blocks: FusedBlocks, results: tuple[Tensor, Tensor, Tensor, Tensor], plan: AlikePlan, even: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Score keys for each list and draw, in one launch: see `operator_alike.choose_alike`.

    Args:
        problem: the problem.
        ordered: the lists.
        edges: begin, hole begin, hole end and end of what earlier stages left for each tile, and the number of keys that it
            may score.
        noise: where inside a slot each list's points lie.
        blocks: the keys.
        results: keys and their log-weights, to be written, ``[lists, rows, num]``; begin and end of what is left,
            ``[lists, rows]``.
        plan: how the choice is cut.
        even: share of the draws that is spread evenly over the keys.

    Returns:
        the memory of the programs.
    """
    given = problem.q, ordered.alike.source, ordered.directions, edges, noise
    of_keys = blocks.keys, blocks.variance, blocks.log_value
    estimates, law = (DEVIATIONS, BOUND), (even, LEAST)
    return choose_alike(given, of_keys, results, plan, problem.scale, estimates, law)
