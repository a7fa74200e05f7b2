"""Sorting and averaging alike queries, and what they are compared with, as torch operators for GPUs: see `operator`."""

import torch
from torch import Tensor

from hyperattention.transforms import refuse_vmap

# largest tile whose rows fit the registers of a program, lists that it is cut into, and numbers in the rows of a list
_MOST_ROWS, _MOST_LISTS, _MOST_NUMBERS = 1024, 16, 16_384
# widest matrix that fits the registers of a program
_MOST_FACTORED = 128
# directions in which rows are compared: what a product of a GPU has at least
_DIRECTIONS = 16


def sorts_alike(rows: int, each: int, width: int) -> bool:
    """Return whether kernels sort and group the queries of a tile; PyTorch does larger ones.

    Args:
        rows: queries of a tile, of all heads of a group.
        each: queries of a list.
        width: numbers in a query.

    Returns:
        whether `sort_alike` and `group_alike` support them; numbers are padded to powers of two.
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


def factors_keys(width: int) -> bool:
    """Return whether a kernel factors covariances of keys of this width; PyTorch factors larger ones."""
    return width <= _MOST_FACTORED


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
    k: Tensor, v: Tensor, centres: Tensor, size: int, normal: int, most: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `triton_alike_blocks.alike_blocks`."""
    from hyperattention.kernels.choose import triton_alike_blocks

    return triton_alike_blocks.alike_blocks(k, v, centres, size, normal, most, dtype)


@alike_blocks.register_fake
def _(k, v, centres, size, normal, most, dtype):
    lists, count, width = k.shape
    keys = k.new_empty((lists, -(-count // size), width), dtype=dtype)
    moments = keys.new_empty((lists, count // (normal * size), 2 * width))
    return keys, keys.new_empty(keys.shape if size > 1 else (0,)), moments, centres.new_empty(keys.shape[:2])


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
    return begin.new_empty((source.shape[0], source.shape[1] // many, _DIRECTIONS, q.shape[3]))


@torch.library.custom_op("hyperattention::group_alike", mutates_args=())
def group_alike(
    q: Tensor, source: Tensor, directions: Tensor, groups: int, scale: float, steps: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See `triton_group_alike.group_alike`."""
    from hyperattention.kernels.choose import triton_group_alike

    return triton_group_alike.group_alike(q, source, directions, groups, scale, steps, dtype)


@group_alike.register_fake
def _(q, source, directions, groups, scale, steps, dtype):
    shape = (*directions.shape[:2], source.shape[1] // directions.shape[1])
    query = q.new_empty((*shape, groups, q.shape[3]), dtype=dtype)
    return query, q.new_empty((*shape, 2 * q.shape[3]), dtype=dtype), directions.new_empty((*shape, groups))


@torch.library.custom_op("hyperattention::alike_bars", mutates_args=())
def alike_bars(
    query: Tensor, log_rows: Tensor, moments: Tensor, edges: Tensor, size: int, normal: int, log_size: float, bound: float
) -> Tensor:
    """See `triton_alike_bars.alike_bars`."""
    from hyperattention.kernels.choose import triton_alike_bars

    return triton_alike_bars.alike_bars(query, log_rows, moments, edges, size, normal, log_size, bound)


@alike_bars.register_fake
def _(query, log_rows, *rest):
    return torch.empty_like(log_rows)


for _operator in (_alike_first, alike_bars, alike_blocks, group_alike, key_factors, sort_alike):
    refuse_vmap(_operator, "choosing keys")
