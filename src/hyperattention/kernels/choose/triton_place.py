"""Edges of tiles in Triton: one launch writes every number of a tile that depends only on its place.

`tiling.cut`, `Sinks`, `Window` and `CoveredKeys.bounds` compute the same in PyTorch, in some forty launches.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.choose.places import COLUMNS, EDGES, Places
from hyperattention.kernels.launch import Launch


@triton.jit
def _live_before(rank_ptr, position, keys, RANKED: tl.constexpr):
    """Count live keys before each position: see `Problem.live_before`."""
    position = tl.minimum(tl.maximum(position, 0), keys)
    if RANKED:
        position = tl.load(rank_ptr + position - 1, mask=position > 0, other=0)
    return position


@triton.jit(do_not_specialize=["first", "front", "queries"])
def _kernel(
    rank_ptr, table_ptr, edges_ptr, weight_ptr, limit_ptr, index_ptr, key_row_ptr,
    first, front, queries, keys, s_rank, kv_heads, length, step, prefix, before, after,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RANKED: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    PADDED: tl.constexpr, COLUMNS: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    place, one = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tiles, lists = tl.num_programs(0), tl.num_programs(1)
    rank_ptr += (one // kv_heads) * s_rank
    index = first + place // length * step + place % length
    inside = tl.arange(0, PADDED)
    total = _live_before(rank_ptr, place * 0 + keys, keys, RANKED)
    limit = _live_before(rank_ptr, index * SIZE + inside + 1, keys, RANKED) if CAUSAL else total + inside * 0
    row = place * SIZE + inside - front
    limit = tl.where((row >= 0) & (row < queries), limit, 0)
    limit_ptr += (one * tiles + place) * (GROUP * SIZE)
    for head in tl.range(0, GROUP):
        tl.store(limit_ptr + head * SIZE + inside, limit, mask=inside < SIZE)

    start = _live_before(rank_ptr, index * SIZE, keys, RANKED)
    end = _live_before(rank_ptr, (index + 1) * SIZE, keys, RANKED)
    visible_end = end if CAUSAL else total
    begin = tl.minimum(prefix, visible_end)
    # the window's keys, from the first to the end
    window_end = end if CAUSAL else tl.minimum(end + after, total)
    window = start - before
    low = tl.minimum(prefix, window_end)
    hole_begin, hole_end = visible_end, visible_end
    if WINDOW:
        hole_begin = tl.maximum(tl.maximum(window, low), begin)
        hole_end = tl.minimum(tl.maximum(window_end, hole_begin), visible_end)
        hole_begin = tl.minimum(hole_begin, visible_end)
        hole_end = tl.maximum(hole_end, hole_begin)
    known = start if CAUSAL else visible_end

    column = lists * tiles
    at = table_ptr + one * tiles + place
    tl.store(at, place * 0)
    tl.store(at + column, tl.minimum(prefix, visible_end))
    tl.store(at + 2 * column, start)
    tl.store(at + 3 * column, end)
    tl.store(at + 4 * column, total)
    tl.store(at + 5 * column, window)
    tl.store(at + 6 * column, low)
    tl.store(at + 7 * column, window_end)
    tl.store(at + 8 * column, tl.maximum(window, low))
    tl.store(at + 9 * column, visible_end)
    tl.static_assert(COLUMNS == 10)
    at = edges_ptr + (one * tiles + place) * EDGES
    tl.store(at, begin)
    tl.store(at + 1, hole_begin)
    tl.store(at + 2, hole_end)
    tl.store(at + 3, visible_end)
    tl.store(at + 4, known)
    tl.static_assert(EDGES == 5)
    tl.store(weight_ptr + one * tiles + place, 0.0)
    if one == 0:
        tl.store(index_ptr + place, index)
    if place == 0:
        tl.store(key_row_ptr + one, one)


def launch_place(
    places: Places, rank: Tensor | None, results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
) -> Launch:
    """Prepare the launch of `operator_place.place_tiles`, which writes into `results`."""
    table, edges, weight, limit, index, key_row = results
    return Launch(
        _kernel,
        (len(index), len(key_row)),
        {
            "rank_ptr": index if rank is None else rank.contiguous(), "table_ptr": table, "edges_ptr": edges,
            "weight_ptr": weight, "limit_ptr": limit, "index_ptr": index, "key_row_ptr": key_row,
            "first": places.first, "front": places.front, "queries": places.queries, "keys": places.keys,
            "s_rank": 0 if rank is None else rank.shape[1], "kv_heads": places.kv_heads, "length": places.length,
            "step": places.step, "prefix": places.prefix, "before": places.before, "after": places.after,
            "CAUSAL": places.causal, "WINDOW": places.window, "RANKED": rank is not None, "GROUP": places.group,
            "SIZE": places.size, "PADDED": max(16, triton.next_power_of_2(places.size)), "COLUMNS": COLUMNS,
            "EDGES": EDGES, "num_warps": 1,
        },
    )  # fmt: skip
