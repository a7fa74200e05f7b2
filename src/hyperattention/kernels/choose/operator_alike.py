"""Sorting and averaging alike queries, and what they are compared with, as torch operators for GPUs: see `operator`."""

from dataclasses import astuple

import torch
from torch import Tensor

from hyperattention.kernels.choose.alike_plan import AlikePlan, memory_of
from hyperattention.transforms import refuse_vmap

# largest tile whose rows fit the registers of a program, lists that it is cut into, and numbers in the rows of a list
_MOST_ROWS, _MOST_LISTS, _MOST_NUMBERS = 1024, 16, 32_768
# directions in which rows are compared: what a product of a GPU has at least
_DIRECTIONS = 16


def sorts_alike(rows: int, each: int, width: int) -> bool:
    """Return whether kernels sort and group the queries of a tile; PyTorch does larger ones.

    Args:
        rows: queries of a tile, of all heads of a group.
        each: queries of a list.
        width: numbers in a query.

    Returns:
        whether `sort_alike` and `choose_alike` support them; numbers are padded to powers of two.
    """
    many = -(-rows // each)
    each = -(-rows // many)
    padded = [1 << (x - 1).bit_length() for x in (many * each, each, max(16, width))]
    return padded[0] <= _MOST_ROWS and many <= _MOST_LISTS and max(16, padded[1]) * padded[2] <= _MOST_NUMBERS


def parts_of(size: int, group: int, each: int, width: int) -> int | None:
    """Tell into how many parts the heads of a group are divided, so that kernels sort and group the queries of a part.

    Args:
        size: positions of a tile.
        group: heads of a group.
        each: queries of a list.
        width: numbers in a query.

    Returns:
        the fewest parts of equally many heads; None where not even the queries of one head fit, which PyTorch sorts.
    """
    parts = (parts for parts in range(1, group + 1) if group % parts == 0)
    return next((number for number in parts if sorts_alike(size * group // number, each, width)), None)


def alike_first(
    k: Tensor, v: Tensor, num: int, index: Tensor, many: int, heads: Tensor | None, kv_heads: int, states: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what a choice for alike queries needs before anything else, in one launch.

    Args:
        k: keys, ``[lists, keys, width]``.
        v: their values.
        num: leading keys and values that are averaged.
        index: numbers of the tiles.
        many: lists of queries of each tile.
        heads: the kv heads' numbers in their layer; None for all, in order.
        kv_heads: number of kv heads.
        states: what the counters before those of directions, and before those of noise, are hashed to.

    Returns:
        averages of the first keys and of the first values, and how far these lie from it on average, behind one another,
        ``[lists, width + value_dim + 1]``, float32; directions from which those in which queries differ are sought,
        ``[width, 16]``, float32; where inside a slot the points of each list of queries lie, ``[lists, tiles * many]``,
        float64; and the numbers of the lists.
    """
    return _alike_first(k, v, num, index, many, heads, kv_heads, *states)


@torch.library.custom_op("hyperattention::alike_first", mutates_args=())
def _alike_first(
    k: Tensor,
    v: Tensor,
    num: int,
    index: Tensor,
    many: int,
    heads: Tensor | None,
    kv_heads: int,
    state: int,
    noise_state: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from hyperattention.kernels.choose import triton_alike_first

    results = _empty_first(k, v, index, many)
    if k.shape[0] and k.shape[1]:
        triton_alike_first.launch_first(k, v, index, heads, results, num, kv_heads, (state, noise_state)).run()
    return results


def _empty_first(k: Tensor, v: Tensor, index: Tensor, many: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    centres = k.new_empty((k.shape[0], k.shape[2] + v.shape[2] + 1), dtype=torch.float32)
    noise = centres.new_empty((k.shape[0], len(index) * many), dtype=torch.float64)
    return centres, centres.new_empty((k.shape[2], _DIRECTIONS)), noise, index.new_empty(len(k))


@_alike_first.register_fake
def _(k, v, num, index, many, *rest):
    return _empty_first(k, v, index, many)


@torch.library.custom_op("hyperattention::key_factors", mutates_args=())
def key_factors(k: Tensor, centres: Tensor, first: int, growth: int, ridge: float) -> Tensor:
    """See `triton_key_metric.key_factors`."""
    from hyperattention.kernels.choose import triton_key_metric

    return triton_key_metric.key_factors(k, centres, first, growth, ridge)


@key_factors.register_fake
def _(k, centres, first, growth, ridge):
    count, edge = 1, first
    while edge <= k.shape[1]:
        count, edge = count + 1, edge * growth
    return centres.new_empty((k.shape[0], count, k.shape[2], k.shape[2]))


@torch.library.custom_op("hyperattention::alike_blocks", mutates_args=())
def alike_blocks(
    k: Tensor, v: Tensor, centres: Tensor, levels: int, most: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Centre keys, and average them over blocks of 4 keys, of 16, and so on: see `key_blocks.blocks_of`.

    Args:
        k: keys, ``[lists, keys, width]``.
        v: their values.
        centres: from `alike_first`.
        levels: number of sizes, with that of one key.
        most: bound of the logarithms.
        dtype: dtype of the results.

    Returns:
        means of whole blocks, the smallest first, ``[lists, blocks of all sizes, width]``; variances inside those of several
        keys; and logarithms of how far values lie, ``[lists, blocks of all sizes]``.
    """
    from hyperattention.kernels.choose import triton_alike_blocks

    results = _empty_blocks(k, levels, dtype)
    if results[0].numel():
        triton_alike_blocks.launch_blocks(k, v, centres, results, levels, most).run()
    return results


def _empty_blocks(k: Tensor, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    blocks = sum(k.shape[1] >> 2 * level for level in range(levels))
    keys = k.new_empty((len(k), blocks, k.shape[2]), dtype=dtype)
    return keys, keys.new_empty((len(k), blocks - k.shape[1], k.shape[2])), keys.new_empty(keys.shape[:2])


@alike_blocks.register_fake
def _(k, v, centres, levels, most, dtype):
    return _empty_blocks(k, levels, dtype)


@torch.library.custom_op("hyperattention::sort_alike", mutates_args=("source", "live", "inside", "row_limit"))
def sort_alike(
    q: Tensor,
    begin: Tensor,
    factor: Tensor,
    edges: Tensor,
    limit: Tensor,
    source: Tensor,
    live: Tensor,
    inside: Tensor,
    row_limit: Tensor,
    first_tile: int,
    front: int,
    many: int,
    leading: int,
    growth: int,
    scale: float,
    rounds: int,
    steps: int,
) -> Tensor:
    """See `triton_sort_alike.sort_alike`."""
    from hyperattention.kernels.choose import triton_sort_alike

    given, results = (q, begin, factor, edges, limit), (source, live, inside, row_limit)
    numbers = first_tile, front, many, leading, growth, scale, rounds, steps
    return triton_sort_alike.sort_alike(*given, *results, *numbers)


@sort_alike.register_fake
def _(q, begin, factor, edges, limit, source, live, inside, row_limit, first_tile, front, many, *rest):
    return q.new_empty((source.shape[0], source.shape[1] // many, _DIRECTIONS, q.shape[3]))


def choose_alike(
    given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    blocks: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    plan: AlikePlan,
    scale: float,
    estimates: tuple[float, float],
    law: tuple[float, float],
) -> tuple[Tensor, ...]:
    """Group queries, score keys for them and draw, in one launch.

    Args:
        given: queries, ``[batch, heads, queries, width]``; the query in each row of each list, counted over the heads of a
            group, ``[lists, tiles * many, rows]``; directions from `sort_alike`; edges of what earlier stages left for each
            tile, the last of which counts the keys that it may score, ``[lists, tiles, 5]``; where inside a slot each
            list's points lie, ``[lists, tiles * many]``, float64.
        blocks: from `alike_blocks`.
        results: for the keys, ascending, and for their log-weights, ``[lists, tiles * many, draws]``; for begin and end of
            what is left, ``[lists, tiles * many]``.
        plan: how it is cut.
        scale: factor of the queries.
        estimates: deviations by which a query may exceed the average of its group, and the bound of what its scores are
            compared with.
        law: share of the draws that is spread evenly; sums below the second number count as 0.

    Returns:
        the memory of programs, from `alike_plan.memory_of`, as the last lists of each left it.
    """
    rows, tiles = given[3].shape[:2]
    memory = memory_of(plan, given[0], rows, tiles, blocks[0].dtype)
    _choose_alike(*given, *blocks, *results, *memory, list(astuple(plan)), scale, *estimates, *law)
    return memory


@torch.library.custom_op(
    "hyperattention::choose_alike",
    mutates_args=("index", "weight", "low", "high", "query", "spread", "log_rows", "bar", "share", "numbers"),
)
def _choose_alike(
    q: Tensor,
    source: Tensor,
    directions: Tensor,
    edges: Tensor,
    noise: Tensor,
    keys: Tensor,
    variance: Tensor,
    log_value: Tensor,
    index: Tensor,
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    query: Tensor,
    spread: Tensor,
    log_rows: Tensor,
    bar: Tensor,
    share: Tensor,
    numbers: Tensor,
    of_plan: list[int],
    scale: float,
    deviations: float,
    bound: float,
    even: float,
    least: float,
) -> None:
    from hyperattention.kernels.choose import triton_choose_alike

    if index.numel():
        given, blocks = (q, source, directions, edges, noise), (keys, variance, log_value)
        results, memory = (index, weight, low, high), (query, spread, log_rows, bar, share, numbers)
        last = scale, deviations, bound, even, least
        triton_choose_alike.launch_choice(given, blocks, results, memory, AlikePlan(*of_plan), *last).run()


for _operator in (_alike_first, _choose_alike, alike_blocks, key_factors, sort_alike):
    refuse_vmap(_operator, "choosing keys")
