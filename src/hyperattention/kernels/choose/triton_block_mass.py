"""Masses of blocks in Triton: one launch scores the blocks of a level for every tile; scores are not written to memory.

The kernels compute the same as `select.score.walk` in batches on a CPU: first each query's log-sum-exp, as if the scores of
a block were normal; then each block's mass, the largest weight that any query of the tile gives its representatives.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

from math import log

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch

# blocks scored at once
BLOCK = 64


@triton.jit
def _edges(edges_ptr, tile, tiles, s_edges):
    at = edges_ptr + tile // tiles * s_edges + tile % tiles * 5
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


@triton.jit
def _known(first, size, begin, hole_begin, hole_end, end, until):
    """Return which blocks a tile may use: those before it, and those without keys of earlier stages."""
    last = first + size
    left = ((first >= begin) & (last <= hole_begin)) | ((first >= hole_end) & (last <= end))
    return left | (last <= until)


@triton.jit
def _queries(query_ptr, tile, tiles, rows, width, s_list, s_tile, s_row, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    at = query_ptr + (tile // tiles) * s_list + (tile % tiles) * s_tile + row * s_row + column
    return tl.load(at, mask=(row < rows) & (column < width), other=0.0)


@triton.jit
def _lse_kernel(
    query_ptr, moments_ptr, edges_ptr, lse_ptr, tiles, rows, width, number, blocks, size, log_size,
    s_list, s_tile, s_row, s_edges,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    begin, hole_begin, hole_end, end, until = _edges(edges_ptr, tile, tiles, s_edges)
    query = _queries(query_ptr, tile, tiles, rows, width, s_list, s_tile, s_row, ROWS, WIDTH)
    square = (query.to(tl.float32) * query.to(tl.float32) * 0.5).to(query.dtype)
    column = tl.arange(0, WIDTH)[None, :]
    source = moments_ptr + (tile // tiles) * blocks * 2 * width + column
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    count = tl.minimum(number, tl.cdiv(tl.maximum(end, until), size))
    for at in tl.range(0, count, BLOCK):
        place = at + tl.arange(0, BLOCK)
        known = (place < count) & _known(place * size, size, begin, hole_begin, hole_end, end, until)
        inside = known[:, None] & (column < width)
        row = place.to(tl.int64)[:, None] * 2 * width
        mean = tl.load(source + row, mask=inside, other=0.0)
        variance = tl.load(source + row + width, mask=inside, other=0.0)
        score = tl.dot(square, tl.trans(variance), tl.dot(query, tl.trans(mean)))
        score = tl.where(known[None, :], score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        centre = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - centre) + tl.sum(tl.exp(score - centre[:, None]), 1)
        top = new_top
    nothing = total == 0
    lse = tl.where(nothing, LEAST, top + tl.log(tl.where(nothing, 1.0, total)) + log_size)
    row = tl.arange(0, ROWS)
    tl.store(lse_ptr + tile * rows + row, lse, mask=row < rows)


@triton.jit
def _mass_kernel(
    query_ptr, summary_ptr, first_ptr, edges_ptr, lse_ptr, mass_ptr,
    tiles, rows, width, number, blocks, size, cut, s_list, s_tile, s_row, s_edges, s_first,
    EVERY: tl.constexpr, MEANS: tl.constexpr, FAR: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    REPRESENTATIVES: tl.constexpr = MEANS + FAR
    tile = tl.program_id(0).to(tl.int64)
    begin, hole_begin, hole_end, end, until = _edges(edges_ptr, tile, tiles, s_edges)
    query = _queries(query_ptr, tile, tiles, rows, width, s_list, s_tile, s_row, ROWS, WIDTH)
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    source = summary_ptr + (tile // tiles) * blocks * REPRESENTATIVES * width + column
    count = number
    if EVERY:
        count = tl.minimum(number, tl.cdiv(tl.maximum(end, until), size))

    top = tl.full([ROWS], -float("inf"), tl.float32)
    for at in tl.range(0, count, BLOCK):
        place = at + tl.arange(0, BLOCK)
        first = place.to(tl.int64) * size
        if not EVERY:
            first = tl.load(first_ptr + tile * s_first + place, mask=place < count, other=0)
        known = (place >= cut) | _known(first, size, begin, hole_begin, hole_end, end, until)
        known &= place < count
        for r in tl.range(0, REPRESENTATIVES):
            at_key = ((first // size) * REPRESENTATIVES + r)[:, None] * width
            key = tl.load(source + at_key, mask=known[:, None] & (column < width), other=0.0)
            score = tl.where(known[None, :], tl.dot(query, tl.trans(key)), -float("inf"))
            top = tl.maximum(top, tl.max(score, 1))

    # a sum of n exponentials is between the largest and n times the largest, so the estimate is clamped to this range
    lse = tl.load(lse_ptr + tile * rows + row, mask=row < rows, other=0.0)
    bar = tl.minimum(tl.maximum(lse, top), top + tl.log(tl.maximum(end, 1).to(tl.float32)))
    # a padding row, or a row without usable blocks, gives no weight
    bar = tl.where((row < rows) & (top > -float("inf")), bar, float("inf"))
    for at in tl.range(0, count, BLOCK):
        place = at + tl.arange(0, BLOCK)
        first = place.to(tl.int64) * size
        if not EVERY:
            first = tl.load(first_ptr + tile * s_first + place, mask=place < count, other=0)
        known = (place >= cut) | _known(first, size, begin, hole_begin, hole_end, end, until)
        known &= place < count
        mass = tl.zeros([BLOCK], tl.float32)
        for r in tl.range(0, REPRESENTATIVES):
            at_key = ((first // size) * REPRESENTATIVES + r)[:, None] * width
            key = tl.load(source + at_key, mask=known[:, None] & (column < width), other=0.0)
            weight = tl.exp(tl.max(tl.dot(query, tl.trans(key)) - bar[:, None], 0))
            # means represent all keys except the far keys, which represent themselves
            mass += weight * tl.where(r < MEANS, (size - FAR) / MEANS, 1.0)
        tl.store(mass_ptr + tile * number + place, tl.where(known, mass, 0.0), mask=place < count)
    for at in tl.range(count, number, BLOCK):
        place = at + tl.arange(0, BLOCK)
        tl.store(mass_ptr + tile * number + place, 0.0, mask=place < number)


def block_lse(query: Tensor, moments: Tensor, edges: Tensor, number: int, size: int) -> Tensor:
    """Estimate the log-sum-exp of every query over the blocks that its tile may use: see `Walk`.

    Args:
        query: ``[lists, tiles, rows, width]``.
        moments: means, then variances, ``[lists, blocks, 2 * width]``.
        edges: begin, hole begin, hole end, end, and end of the keys before each tile, ``[lists, tiles, 5]``.
        number: number of leading blocks read.
        size: number of keys in a block.

    Returns:
        ``[lists, tiles, rows]``, float32.
    """
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if lse.numel():
        launch_lse(query, moments, edges, lse, number, size).run()
    return lse


def launch_lse(query: Tensor, moments: Tensor, edges: Tensor, lse: Tensor, number: int, size: int) -> Launch:
    """Prepare the launch of `block_lse`, which writes into `lse`."""
    return Launch(
        _lse_kernel,
        (query.shape[0] * query.shape[1],),
        {
            **_common(query, edges, number, size, moments.shape[1]), "moments_ptr": moments.contiguous(), "lse_ptr": lse,
            "log_size": log(size), "LEAST": torch.finfo(torch.float32).min,
        },
    )  # fmt: skip


def block_mass(
    query: Tensor,
    summary: Tensor,
    first: Tensor | None,
    edges: Tensor,
    lse: Tensor,
    number: int,
    size: int,
    cut: int,
    representatives: tuple[int, int],
) -> Tensor:
    """Estimate the mass of every block for every tile: see `Walk`.

    Args:
        query: ``[lists, tiles, rows, width]``.
        summary: representatives, ``[lists, blocks, representatives, width]``.
        first: first key of each scored block, ``[lists, tiles, number]``; None for the leading `number` blocks.
        edges: as for `block_lse`.
        lse: log-sum-exp of each query.
        number: number of scored blocks.
        size: number of keys in a block.
        cut: number of leading blocks that a tile may be forbidden to use.
        representatives: number of means, and number of far keys.

    Returns:
        ``[lists, tiles, number]``, float32; 0 for blocks that a tile may not use.
    """
    mass = query.new_empty((*query.shape[:2], number), dtype=torch.float32)
    if mass.numel():
        launch_mass(query, summary, first, edges, lse, mass, size, cut, representatives).run()
    return mass


def launch_mass(
    query: Tensor,
    summary: Tensor,
    first: Tensor | None,
    edges: Tensor,
    lse: Tensor,
    mass: Tensor,
    size: int,
    cut: int,
    representatives: tuple[int, int],
) -> Launch:
    """Prepare the launch of `block_mass`, which writes into `mass`."""
    means, far = representatives
    # without a list of blocks the edges are passed in its place, and not read
    named = edges if first is None else first.contiguous()
    return Launch(
        _mass_kernel,
        (query.shape[0] * query.shape[1],),
        {
            **_common(query, edges, mass.shape[2], size, summary.shape[1]), "summary_ptr": summary.contiguous(),
            "first_ptr": named, "lse_ptr": lse.contiguous(), "mass_ptr": mass, "cut": cut, "s_first": mass.shape[2],
            "EVERY": first is None, "MEANS": means, "FAR": far,
        },
    )  # fmt: skip


def _common(query: Tensor, edges: Tensor, number: int, size: int, blocks: int) -> dict:
    _, tiles, rows, width = query.shape
    query = query if query.stride(3) == 1 else query.contiguous()
    return {
        "query_ptr": query, "edges_ptr": edges, "s_edges": edges.stride(0), "tiles": tiles, "rows": rows, "width": width,
        "number": number, "blocks": blocks, "size": size,
        "s_list": query.stride(0), "s_tile": query.stride(1), "s_row": query.stride(2),
        "ROWS": max(16, triton.next_power_of_2(rows)), "WIDTH": max(16, triton.next_power_of_2(width)), "BLOCK": BLOCK,
        "num_warps": 4 if rows <= 64 else 8, "num_stages": 2,
    }  # fmt: skip
