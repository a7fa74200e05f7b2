"""Sort the queries of a tile into lists of alike ones in Triton: one launch for all tiles, and no sorted numbers in memory.

A program takes a tile of positions with all heads of a group, or with a part of them where they are many. It finds the
directions in which its rows differ most, and cuts them in halves along such directions, again and again:
`select.alike.sort_alike` does the same in PyTorch. A row carries the number of its part, so that nothing is moved until all
cuts are made.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch

# directions in which rows are compared; numbers of a row that are projected at once
DIRECTIONS = 16
_SLICE = 16
# numbers of rows in registers while directions are sought
_NUMBERS = 8192


@triton.jit
def _finite(x):
    """Replace numbers that are not finite by 0, because they give no information."""
    wide = x.to(tl.float32)
    return tl.where(tl.abs(wide) < float("inf"), wide, 0.0).to(x.dtype)


@triton.jit
def _place(row, first, queries, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """Return the place of a row in its tile, its position and the query it takes; rows that fill up repeat another one."""
    place = tl.minimum(row, GROUP * SIZE - 1)
    position = first + place // GROUP
    return place, position, tl.minimum(tl.maximum(position, 0), queries - 1)


@triton.jit
def _load(q_ptr, row, column, first, queries, s_head, s_query, GROUP: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Load some numbers of some rows, without what is not finite."""
    place, _, query = _place(row, first, queries, GROUP, SIZE)
    at = (place % GROUP).to(tl.int64) * s_head + query.to(tl.int64) * s_query
    return _finite(tl.load(q_ptr + at[:, None] + column[None, :], mask=(column < DIM)[None, :], other=0.0))


@triton.jit
def _orthonormal(columns, COLUMNS: tl.constexpr):
    """Make columns orthonormal, one after the other (Gram-Schmidt, modified); one that the others make up becomes 0."""
    to = tl.arange(0, COLUMNS)
    number = to[None, :]
    columns /= tl.maximum(tl.max(tl.max(tl.abs(columns), 1), 0), 1.1754943508222875e-38)
    columns /= tl.maximum(tl.sqrt(tl.sum(columns * columns, 0)), 1e-18)[None, :]
    for at in tl.range(0, COLUMNS):
        one = tl.sum(tl.where(number == at, columns, 0.0), 1)
        along = tl.sum(one[:, None] * columns, 0)
        # what is left of a column of length 1
        length = tl.sqrt(tl.sum(tl.where(to == at, along, 0.0), 0))
        factor = tl.where(length > 1e-5, 1.0 / tl.maximum(length, 1e-5), 0.0)
        one, along = one * factor, along * factor
        left = tl.where(number > at, columns - one[:, None] * along[None, :], columns)
        columns = tl.where(number == at, one[:, None], left)
    return columns


@triton.jit
def _ordered(x):
    """Return integers in the order of the numbers."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit
def _first(key, inside, count):
    """Choose the `count` smallest keys inside; of equal ones the first. Finds the next key by 4 bits at a time."""
    digit = tl.arange(0, 16).to(tl.uint32)
    edge, unit = tl.full([], 0, tl.uint32), tl.full([], 2**28, tl.uint32)
    for _ in tl.range(0, 8):
        steps = edge + digit * unit
        below = tl.sum(((key[:, None] < steps[None, :]) & inside[:, None]).to(tl.int32), 0)
        edge += (tl.sum((below <= count).to(tl.int32), 0) - 1).to(tl.uint32) * unit
        unit = unit >> 4
    below = inside & (key < edge)
    equal = inside & (key == edge)
    rank = tl.cumsum(equal.to(tl.int32), 0)
    return below | (equal & (rank <= count - tl.sum(below.to(tl.int32), 0)))


@triton.jit
def _axis(off, row, STEPS: tl.constexpr):
    """Return how far rows lie along the direction in which they differ most: a few steps from the farthest one."""
    far = tl.argmax(tl.sum(off * off, 1), 0)
    axis = tl.sum(tl.where((row == far)[:, None], off, 0.0), 0)
    along = tl.sum(off * axis[None, :], 1)
    for _ in tl.range(0, STEPS):
        axis = tl.sum(off * along[:, None], 0)
        axis /= tl.maximum(tl.max(tl.abs(axis), 0), 1.1754943508222875e-38)
        axis /= tl.maximum(tl.sqrt(tl.sum(axis * axis, 0)), 1e-18)
        along = tl.sum(off * axis[None, :], 1)
    return along


@triton.jit
def _multiplied(
    factor_ptr, memory_ptr, x, dtype: tl.constexpr, TRANSPOSED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    SLICE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply columns by a factor, or by its transpose: a slice at a time, out of memory, as registers hold no square."""
    column, to = tl.arange(0, WIDTH), tl.arange(0, COLUMNS)
    tl.store(memory_ptr + to[None, :] * DIM + column[:, None], x, mask=(column < DIM)[:, None])
    tl.debug_barrier()
    result = tl.zeros([WIDTH, COLUMNS], tl.float32)
    for begin in tl.range(0, WIDTH, SLICE, num_stages=1):
        part = begin + tl.arange(0, SLICE)
        some = tl.load(memory_ptr + to[None, :] * DIM + part[:, None], mask=(part < DIM)[:, None], other=0.0)
        at = part[None, :] * DIM + column[:, None] if TRANSPOSED else column[:, None] * DIM + part[None, :]
        factor = tl.load(factor_ptr + at, mask=(part < DIM)[None, :] & (column < DIM)[:, None], other=0.0)
        result = tl.dot(factor.to(dtype), some.to(dtype), result, input_precision=PRECISION)
    tl.debug_barrier()
    return result


@triton.jit(do_not_specialize=["first_tile", "front"])
def _kernel(
    q_ptr, begin_ptr, factor_ptr, edges_ptr, limit_ptr, source_ptr, live_ptr, inside_ptr, row_limit_ptr, directions_ptr,
    scale, first_tile, front, queries, kv_heads, factors, leading, s_batch, s_head, s_query, s_list, s_edges, s_limit,
    s_limit_tile, GROWTH: tl.constexpr, EDGES: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr, SIZE: tl.constexpr, MANY: tl.constexpr, EACH: tl.constexpr, LEAVES: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, SLICE: tl.constexpr,
    COLUMNS: tl.constexpr, ROUNDS: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    one, place_of_tile = tl.program_id(1).to(tl.int64), tl.program_id(0) // PARTS
    # heads of the group before those of this part
    before = tl.program_id(0) % PARTS * GROUP
    first = (first_tile + place_of_tile) * SIZE - front
    q_ptr += (one // kv_heads) * s_batch + ((one % kv_heads) * PARTS * GROUP + before) * s_head
    directions_ptr += (one * tl.num_programs(0) + tl.program_id(0)) * COLUMNS * DIM
    # the factor of the most leading keys among those that all queries of the tile see
    known = tl.load(edges_ptr + one * s_edges + place_of_tile * EDGES + EDGES - 1)
    number, edge = 0, leading
    for _ in tl.range(1, factors):
        number += (known >= edge).to(tl.int32)
        edge *= GROWTH
    factor_ptr += (one * factors + number) * DIM * DIM
    full: tl.constexpr = MANY * EACH
    column, to = tl.arange(0, WIDTH), tl.arange(0, COLUMNS)
    # directions in which rows differ most: products with their covariance, of which only the products are made
    there = (column < DIM)[:, None]
    # that is, rows times the factor: not they but the directions are multiplied by it
    directions = tl.load(begin_ptr + column[:, None] * COLUMNS + to[None, :], mask=there, other=0.0)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    if ROUNDS > 0:
        mean = tl.zeros([WIDTH], tl.float32)
        for begin in tl.range(0, full, PART):
            row = begin + tl.arange(0, PART)
            x = _load(q_ptr, row, column, first, queries, s_head, s_query, GROUP, SIZE, DIM).to(tl.float32)
            mean += tl.sum(tl.where((row < full)[:, None], x, 0.0), 0)
        mean /= full
        for _ in tl.range(0, ROUNDS):
            narrow = _multiplied(
                factor_ptr, directions_ptr, directions, dtype, False, DIM, WIDTH, SLICE, COLUMNS, PRECISION
            ).to(dtype)
            # centred rows have centred products, whose products with the mean add up to nothing
            middle = tl.sum(mean[:, None] * narrow.to(tl.float32), 0)
            image = tl.zeros([WIDTH, COLUMNS], tl.float32)
            for begin in tl.range(0, full, PART):
                row = begin + tl.arange(0, PART)
                x = _load(q_ptr, row, column, first, queries, s_head, s_query, GROUP, SIZE, DIM)
                along = tl.dot(x, narrow, input_precision=PRECISION) - middle[None, :]
                along = tl.where((row < full)[:, None], along, 0.0).to(x.dtype)
                image = tl.dot(tl.trans(x), along, image, input_precision=PRECISION)
            image = _finite(image)
            image /= tl.maximum(tl.max(tl.max(tl.abs(image), 1), 0), 1.1754943508222875e-38)
            image = _multiplied(factor_ptr, directions_ptr, image, dtype, True, DIM, WIDTH, SLICE, COLUMNS, PRECISION)
            directions = _finite(_orthonormal(image, COLUMNS))
    directions = _multiplied(factor_ptr, directions_ptr, directions, dtype, False, DIM, WIDTH, SLICE, COLUMNS, PRECISION)
    tl.store(directions_ptr + to[None, :] * DIM + column[:, None], directions, mask=there)
    # read again a part at a time, by other threads
    tl.debug_barrier()
    row = tl.arange(0, ROWS)
    few = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in tl.range(0, WIDTH, SLICE):
        part = begin + tl.arange(0, SLICE)
        x = _load(q_ptr, row, part, first, queries, s_head, s_query, GROUP, SIZE, DIM)
        way = tl.load(directions_ptr + to[None, :] * DIM + part[:, None], mask=(part < DIM)[:, None], other=0.0)
        few = tl.dot(x, way.to(x.dtype), few, input_precision=PRECISION)
    few = _finite(few * scale)
    # a tree of cuts; the parts of part n are numbered 2 n and 2 n + 1, and `wide` parts are as far from the root
    node, wide = tl.full([ROWS], 1, tl.int32), 1
    for parent in tl.range(1, LEAVES):
        wide = tl.where(parent >= 2 * wide, 2 * wide, wide)
        across = parent - wide
        lists = across * MANY // wide
        own = (node == parent) & (row < full)
        size = tl.maximum(((across + 1) * MANY // wide - lists) * EACH, 1)
        off = few - (tl.sum(tl.where(own[:, None], few, 0.0), 0) / size)[None, :]
        off = tl.where(own[:, None], off, 0.0)
        left = _first(_ordered(_finite(_axis(off, row, STEPS))), own, ((2 * across + 1) * MANY // (2 * wide) - lists) * EACH)
        node = tl.where(own, 2 * parent + 1 - left.to(tl.int32), node)
    number = (node - LEAVES) * MANY // LEAVES
    rank = tl.zeros([ROWS], tl.int32)
    for each in tl.range(0, MANY):
        own = (number == each) & (row < full)
        rank = tl.where(own, tl.cumsum(own.to(tl.int32), 0) - 1, rank)
    place, position, query = _place(row, first, queries, GROUP, SIZE)
    live = (row < GROUP * SIZE) & (position == query)
    limit_at = limit_ptr + (one // kv_heads) * s_limit + (first_tile + place_of_tile) * s_limit_tile + place // GROUP
    limit = tl.load(limit_at, mask=live, other=0)
    out = one * s_list + tl.program_id(0).to(tl.int64) * full + number * EACH + rank
    head = before + place % GROUP
    inside = row < full
    tl.store(source_ptr + out, head.to(tl.int64) * queries + query, mask=inside)
    tl.store(live_ptr + out, live, mask=inside)
    tl.store(inside_ptr + out, (place // GROUP * (PARTS * GROUP) + head).to(tl.int64), mask=inside)
    tl.store(row_limit_ptr + out, limit, mask=inside)


def sort_alike(
    q: Tensor, begin: Tensor, factor: Tensor, edges: Tensor, limit: Tensor, source: Tensor, live: Tensor, inside: Tensor,
    row_limit: Tensor, first_tile: int, front: int, many: int, leading: int, growth: int,
    scale: float, rounds: int, steps: int,
) -> Tensor:  # fmt: skip
    """Sort the queries of some tiles into lists of alike ones: see `select.alike.sort_alike`.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``.
        begin: directions from which those in which queries differ are sought, ``[head_dim, 16]``, float32.
        factor: what queries may be multiplied by before they are compared, ``[lists, factors, head_dim, head_dim]``.
        edges: edges of each tile, the last of which counts the keys that all of its queries see, ``[lists, chunk, 5]``.
        limit: leading keys that each position of each tile may see, ``[batch, tiles, size]``, or once for the whole
            batch; 0 for padding.
        source: for the query in each sorted row, counted over the heads of a group, ``[lists, chunk * many, rows]``.
        live: for which rows are not padding.
        inside: for the place of each row in its tile.
        row_limit: for the leading keys that each row may see.
        first_tile: place of the first tile.
        front: padding positions before the first query of the first tile of all.
        many: lists of each part of a tile, of which a tile has as many as make up `source`: neighbouring heads of a group.
        leading: keys of the factor behind the identity; `growth` times as many of each that follows.
        growth: how many times as many.
        scale: factor of the queries.
        rounds: products with the covariance that turn directions; 0 for the given ones.
        steps: steps towards the direction of a cut.

    Returns:
        the directions in which rows of a part were compared, times the factor, as rows: ``[lists, chunk * parts, 16,
        head_dim]``, in the dtype of the queries, in which they are multiplied.
    """
    directions = q.new_empty(source.shape[0], source.shape[1] // many, DIRECTIONS, q.shape[3])
    if source.numel():
        results = source, live, inside, row_limit, directions
        given = q, begin, (factor, edges), limit, results, first_tile, front
        launch_sort(*given, scale, rounds, steps, (leading, growth)).run()
    return directions


def launch_sort(
    q: Tensor, begin: Tensor, metric: tuple[Tensor, Tensor], limit: Tensor, results: tuple[Tensor, ...], first_tile: int,
    front: int, scale: float, rounds: int, steps: int, levels: tuple[int, int],
) -> Launch:  # fmt: skip
    """Prepare the launch of `sort_alike`, which writes into `results`, the directions last."""
    source, live, inside, row_limit, directions = results
    factor, edges, limit = metric[0].contiguous(), metric[1], limit if limit.stride(2) == 1 else limit.contiguous()
    q, size = q if q.stride(3) == 1 else q.contiguous(), limit.shape[2]
    many, each, width = source.shape[1] // directions.shape[1], source.shape[2], triton.next_power_of_2(q.shape[3])
    kv_heads, parts = source.shape[0] // q.shape[0], directions.shape[1] // edges.shape[1]
    rows, width = max(16, triton.next_power_of_2(many * each)), max(16, width)
    return Launch(
        _kernel,
        (directions.shape[1], source.shape[0]),
        {
            "q_ptr": q, "begin_ptr": begin.contiguous(), "factor_ptr": factor, "edges_ptr": edges,
            "limit_ptr": limit, "source_ptr": source, "live_ptr": live, "inside_ptr": inside,
            "row_limit_ptr": row_limit, "directions_ptr": directions,
            "scale": scale, "first_tile": first_tile, "front": front, "queries": q.shape[2], "kv_heads": kv_heads,
            "factors": factor.shape[1], "s_batch": q.stride(0), "s_head": q.stride(1), "s_query": q.stride(2),
            "leading": levels[0], "s_list": source.stride(0), "s_edges": edges.stride(0),
            "s_limit": limit.stride(0) if len(limit) > 1 else 0, "s_limit_tile": limit.stride(1), "GROWTH": levels[1],
            "EDGES": edges.shape[2],
            "PARTS": parts, "GROUP": q.shape[1] // kv_heads // parts, "SIZE": size, "MANY": many, "EACH": each,
            "LEAVES": triton.next_power_of_2(many), "ROWS": rows, "DIM": q.shape[3], "WIDTH": width,
            "PART": max(16, min(rows, _NUMBERS // width)), "SLICE": _SLICE, "COLUMNS": DIRECTIONS, "ROUNDS": rounds,
            "STEPS": steps, "PRECISION": "ieee" if torch.version.hip else "tf32",
            "num_warps": 8, "num_stages": 2, **_registers(q, rows),
        },
    )  # fmt: skip


def _registers(q: Tensor, rows: int) -> dict:
    """Bound the registers of a thread where rows fit in fewer, so that a multiprocessor holds two programs."""
    return {} if torch.version.hip or rows > 512 or q.dtype == torch.float32 else {"maxnreg": 128}
