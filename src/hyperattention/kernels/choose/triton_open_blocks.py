"""Open the heaviest blocks of a level in Triton: one launch for all tiles, and nothing is sorted but what is opened.

`select.score.walk.Walk._open` does the same in PyTorch, in some thirty launches. A program takes a tile.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.choose.triton_sort_alike import _first, _ordered
from hyperattention.kernels.launch import Launch


@triton.jit
def _kernel(
    mass_ptr, first_ptr, edges_ptr, alive_ptr, opened_ptr, number, size, keep, cut, nothing, child, s_edges,
    EVERY: tl.constexpr, EDGES: tl.constexpr, BLOCKS: tl.constexpr, KEPT: tl.constexpr, INSIDE: tl.constexpr,
    CHILDREN: tl.constexpr,
):  # fmt: skip
    tile, one = tl.program_id(0), tl.program_id(1).to(tl.int64)
    edges_ptr += one * s_edges + tile * EDGES
    begin, hole_begin = tl.load(edges_ptr), tl.load(edges_ptr + 1)
    hole_end, end = tl.load(edges_ptr + 2), tl.load(edges_ptr + 3)
    at = one * tl.num_programs(0) + tile
    place = tl.arange(0, BLOCKS)
    there = place < number
    first = place.to(tl.int64) * size
    if not EVERY:
        first = tl.load(first_ptr + at * number + place, mask=there, other=0)
    until = first + size
    whole = ((first >= begin) & (until <= hole_begin)) | ((first >= hole_end) & (until <= end))
    left = (tl.minimum(until, hole_begin) > tl.maximum(first, begin)) | (
        tl.minimum(until, end) > tl.maximum(first, hole_end)
    )
    mass = tl.load(mass_ptr + at * number + place, mask=there, other=0.0)
    # infinite masses come before all others but blocks that an edge cuts
    rank = tl.where(mass == mass, tl.minimum(mass, 3.4028234663852886e38), 0.0)
    rank = tl.where(whole, rank, tl.where(left, float("inf"), -1.0))
    key = _ordered(-rank)
    opened = _first(key, there, keep)
    ahead = _first(key, there, cut)
    tl.store(alive_ptr + at * number + place, (whole & ~opened).to(tl.uint8), mask=there)
    # the opened ones, to be sorted: first those that may extend into the tile
    first = tl.where(rank < 0, nothing, first)
    behind = opened & ~ahead
    to = tl.where(ahead, tl.cumsum(ahead.to(tl.int32), 0) - 1, cut + tl.cumsum(behind.to(tl.int32), 0) - 1)
    opened_ptr += at * keep * INSIDE
    tl.store(opened_ptr + to, first, mask=opened)
    tl.debug_barrier()
    slot = tl.arange(0, KEPT)
    taken = slot < keep
    first = tl.load(opened_ptr + slot, mask=taken, other=0)
    across = tl.load(opened_ptr + slot, mask=taken, other=0)
    tl.debug_barrier()
    together = ((slot < cut)[:, None] == (slot < cut)[None, :]) & taken[:, None]
    smaller = (first[:, None] < across[None, :]) | ((first[:, None] == across[None, :]) & (slot[:, None] < slot[None, :]))
    # of each column
    to = tl.sum((together & smaller).to(tl.int32), 0) + tl.where(slot < cut, 0, cut)
    part = tl.arange(0, CHILDREN)
    inside = taken[:, None] & (part < INSIDE)[None, :]
    tl.store(opened_ptr + to[:, None] * INSIDE + part[None, :], across[:, None] + (part * child)[None, :], mask=inside)


def launch_open(
    mass: Tensor, first: Tensor | None, edges: Tensor, results: tuple[Tensor, Tensor], size: int, keep: int, cut: int,
    nothing: int, child: int,
) -> Launch:  # fmt: skip
    """Prepare the launch of `operator_search.open_blocks`, which writes into `results`."""
    alive, opened = results
    return Launch(
        _kernel,
        (mass.shape[1], mass.shape[0]),
        {
            "mass_ptr": mass, "first_ptr": mass if first is None else first, "edges_ptr": edges, "alive_ptr": alive,
            "opened_ptr": opened, "number": mass.shape[2], "size": size, "keep": keep, "cut": cut, "nothing": nothing,
            "child": child, "s_edges": edges.stride(0), "EVERY": first is None, "EDGES": edges.shape[2],
            "BLOCKS": max(16, triton.next_power_of_2(mass.shape[2])), "KEPT": max(16, triton.next_power_of_2(keep)),
            "INSIDE": size // child, "CHILDREN": triton.next_power_of_2(size // child), "num_warps": 4,
        },
    )  # fmt: skip
