"""Inputs of a hierarchical search in Triton: one pass centres and projects keys, another pools queries."""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch

# keys of a program, and numbers of a vector processed at once
_KEYS, _PART = 64, 32


@triton.jit
def _finite(x):
    """Replace numbers that are not finite by 0, because they give no information."""
    return tl.where((x == x) & (tl.abs(x) < float("inf")), x, 0.0)


@triton.jit
def _basis(basis_ptr, row, column, to, dim, width):
    """Load some rows of a basis."""
    at = basis_ptr + row * dim * width + column[:, None] * width + to[None, :]
    return tl.load(at, mask=(column[:, None] < dim) & (to[None, :] < width), other=0.0)


@triton.jit
def _keys_kernel(
    k_ptr, middle_ptr, basis_ptr, out_ptr, keys, room, dim, width, s_list, s_key,
    PROJECTS: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    key = (tl.program_id(0) * KEYS + tl.arange(0, KEYS)).to(tl.int64)
    to = tl.arange(0, WIDTH)
    there = (key < keys)[:, None]
    out_at = out_ptr + (row * room + key[:, None]) * width
    projected = tl.zeros([KEYS, WIDTH], tl.float32)
    for begin in tl.range(0, dim, PART):
        column = begin + tl.arange(0, PART)
        inside = column < dim
        middle = tl.load(middle_ptr + row * dim + column, mask=inside, other=0.0)
        at = k_ptr + row * s_list + key[:, None] * s_key + column[None, :]
        x = tl.load(at, mask=there & inside[None, :], other=0.0).to(tl.float32) - middle[None, :]
        x = tl.where(there, x, 0.0)
        if PROJECTS:
            projected = tl.dot(x, _basis(basis_ptr, row, column, to, dim, width), projected, input_precision=PRECISION)
        else:
            tl.store(out_at + column[None, :], _finite(x), mask=(key < room)[:, None] & inside[None, :])
    if PROJECTS:
        tl.store(out_at + to[None, :], _finite(projected), mask=(key < room)[:, None] & (to[None, :] < width))


@triton.jit
def _queries_kernel(
    q_ptr, basis_ptr, out_ptr, scale, tiles, first_tile, size, group, pooled, each, offset, queries, kv_heads, dim, width,
    s_batch, s_head, s_query,
    PROJECTS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tile, row_of_keys = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, to = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    wanted = row < group * pooled
    head = (row_of_keys % kv_heads) * group + row // pooled
    source = q_ptr + (row_of_keys // kv_heads) * s_batch + head[:, None] * s_head
    first = (first_tile + tile).to(tl.int64) * size - offset
    out_at = out_ptr + ((row_of_keys * tiles + tile) * group * pooled + row)[:, None] * width
    projected = tl.zeros([ROWS, WIDTH], tl.float32)
    for begin in tl.range(0, dim, PART):
        column = begin + tl.arange(0, PART)
        inside = column < dim
        total, count = tl.zeros([ROWS, PART], tl.float32), tl.zeros([ROWS], tl.float32)
        for e in tl.range(0, each):
            slot = (row % pooled) * each + e
            query = first + slot
            live = wanted & (slot < size) & (query >= 0) & (query < queries)
            at = source + query[:, None] * s_query + column[None, :]
            total += tl.load(at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
            count += live.to(tl.float32)
        x = total * (scale / tl.maximum(count, 1.0))[:, None]
        if PROJECTS:
            projected = tl.dot(
                x, _basis(basis_ptr, row_of_keys, column, to, dim, width), projected, input_precision=PRECISION
            )
        else:
            kept = _finite(x).to(out_ptr.dtype.element_ty)
            tl.store(out_at + column[None, :], kept, mask=wanted[:, None] & inside[None, :])
    if PROJECTS:
        kept = _finite(projected).to(out_ptr.dtype.element_ty)
        tl.store(out_at + to[None, :], kept, mask=wanted[:, None] & (to[None, :] < width))


def prepare_keys(k: Tensor, middle: Tensor, basis: Tensor | None, room: int) -> Tensor:
    """Centre and project keys, and replace numbers that are not finite.

    Args:
        k: keys, ``[lists, keys, head_dim]``.
        middle: vector subtracted from each key, ``[lists, 1, head_dim]``, float32.
        basis: directions to project on, ``[lists, head_dim, width]``, float32; None for no projection.
        room: number of keys of the result; those beyond `keys` are zeros.

    Returns:
        ``[lists, room, width]``, float32.
    """
    keys = k.new_empty((k.shape[0], room, k.shape[2] if basis is None else basis.shape[2]), dtype=torch.float32)
    if keys.numel():
        launch_keys(k, middle, basis, keys).run()
    return keys


def launch_keys(k: Tensor, middle: Tensor, basis: Tensor | None, keys: Tensor) -> Launch:
    """Prepare the launch of `prepare_keys`, which writes into `keys`."""
    k = k if k.stride(2) == 1 else k.contiguous()
    return Launch(
        _keys_kernel,
        (triton.cdiv(keys.shape[1], _KEYS), k.shape[0]),
        {
            "k_ptr": k, "middle_ptr": middle.contiguous(), "out_ptr": keys, "keys": k.shape[1], "room": keys.shape[1],
            "s_list": k.stride(0), "s_key": k.stride(1), "KEYS": _KEYS, "num_warps": 4, "num_stages": 1,
            **_projection(k, basis, keys),
        },
    )  # fmt: skip


def prepare_queries(
    q: Tensor,
    basis: Tensor | None,
    dtype: torch.dtype,
    tiles: int,
    first_tile: int,
    size: int,
    pooled: int,
    offset: int,
    kv_heads: int,
    scale: float,
) -> Tensor:
    """Average neighbouring queries, scale and project the averages, and replace numbers that are not finite.

    Args:
        q: queries, ``[batch, heads, queries, head_dim]``.
        basis: directions to project on, ``[batch * kv_heads, head_dim, width]``, float32; None for no projection.
        dtype: dtype of the result.
        tiles: number of tiles.
        first_tile: number of the first tile, counted from position 0.
        size: positions in a tile.
        pooled: number of averages per tile and head.
        offset: position of the first query.
        kv_heads: number of kv heads.
        scale: factor of the averages.

    Returns:
        ``[batch * kv_heads, tiles, group * averages, width]``, at most `pooled` averages of each head, over equal runs.
    """
    each = -(-size // min(pooled, size))
    lists, group = q.shape[0] * kv_heads, q.shape[1] // kv_heads
    shape = (lists, tiles, group * -(-size // each), q.shape[3] if basis is None else basis.shape[2])
    pools = q.new_empty(shape, dtype=dtype)
    if pools.numel():
        launch_queries(q, basis, pools, first_tile, size, each, offset, kv_heads, scale).run()
    return pools


def launch_queries(
    q: Tensor,
    basis: Tensor | None,
    pools: Tensor,
    first_tile: int,
    size: int,
    each: int,
    offset: int,
    kv_heads: int,
    scale: float,
) -> Launch:
    """Prepare the launch of `prepare_queries`, which writes into `pools`."""
    q = q if q.stride(3) == 1 else q.contiguous()
    group, rows = q.shape[1] // kv_heads, pools.shape[2]
    return Launch(
        _queries_kernel,
        (pools.shape[1], pools.shape[0]),
        {
            "q_ptr": q, "out_ptr": pools, "scale": scale, "tiles": pools.shape[1], "first_tile": first_tile, "size": size,
            "group": group, "pooled": rows // group, "each": each, "offset": offset, "queries": q.shape[2],
            "kv_heads": kv_heads, "s_batch": q.stride(0), "s_head": q.stride(1), "s_query": q.stride(2),
            "ROWS": max(16, triton.next_power_of_2(rows)), "num_warps": 4 if rows <= 64 else 8, "num_stages": 2,
            **_projection(q, basis, pools),
        },
    )  # fmt: skip


def _projection(x: Tensor, basis: Tensor | None, result: Tensor) -> dict:
    dim, width = x.shape[-1], result.shape[-1]
    return {
        "basis_ptr": x if basis is None else basis.contiguous(), "dim": dim, "width": width, "PROJECTS": basis is not None,
        "PRECISION": "ieee" if torch.version.hip else "tf32x3", "PART": max(16, min(_PART, triton.next_power_of_2(dim))),
        "WIDTH": max(16, triton.next_power_of_2(width)),
    }  # fmt: skip
