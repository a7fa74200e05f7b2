"""Shares of keys for lists of alike queries in Triton: one launch scores all keys, and scores are not written to memory.

The kernel computes what `select.score.alike_scan` does in chunks on a CPU: the largest normalised score over the groups of a
list, an allowance for what averages hide, and the exponential of both.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch

# averages that a key serves once it was read, out of how many lists at most; keys read at once
_ROWS, _MOST_LISTS, _KEYS = 128, 32, 64
# a row of shares has a multiple of so many places
_ALIGNED = 16


@triton.jit
def _kernel(
    query_ptr, bar_ptr, spread_ptr, keys_ptr, variance_ptr, log_value_ptr, edges_ptr, share_ptr,
    lists, blocks, room, size, s_query, s_edges,
    EDGES: tl.constexpr, MANY: tl.constexpr, OF_LIST: tl.constexpr, DIM: tl.constexpr, MOMENTS: tl.constexpr,
    DEVIATIONS: tl.constexpr,
    WITHIN: tl.constexpr, LISTS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row_of_keys = tl.program_id(1).to(tl.int64)
    # the last lists, which see most, begin first
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * LISTS
    column = tl.arange(0, WIDTH)[None, :]
    # averages: all lists of a group stand together, so that the largest over groups is found inside a thread
    average = tl.arange(0, LISTS * GROUPS)
    group, of = average // LISTS, begin + average % LISTS
    there = (of < lists) & (group < OF_LIST)
    at = of.to(tl.int64) * OF_LIST + group
    query = tl.load(
        query_ptr + row_of_keys * s_query + at[:, None] * DIM + column, mask=there[:, None] & (column < DIM), other=0.0
    )
    # what is no average is below any score
    bar = tl.load(bar_ptr + row_of_keys * lists * OF_LIST + at, mask=there, other=float("inf"))
    one = begin + tl.arange(0, LISTS)
    known_at = edges_ptr + row_of_keys * s_edges + one // MANY * EDGES + EDGES - 1
    known = tl.load(known_at, mask=one < lists, other=0).to(tl.int32) // size
    spread_at = spread_ptr + (row_of_keys * lists + one)[:, None] * MOMENTS + column
    inside = (one < lists)[:, None] & (column < DIM)
    spread = tl.load(spread_at, mask=inside, other=0.0)
    if WITHIN:
        half = tl.load(spread_at + DIM, mask=inside, other=0.0)
    query, spread = tl.trans(query), tl.trans(spread)
    key_at = row_of_keys * blocks
    share_at = share_ptr + (row_of_keys * lists + one)[None, :] * room
    count = tl.max(known, 0)
    for first in tl.range(0, count, KEYS):
        key = first + tl.arange(0, KEYS)
        read = (key < count)[:, None] & (column < DIM)
        x = tl.load(keys_ptr + (key_at + key)[:, None] * DIM + column, mask=read, other=0.0)
        score = tl.dot(x, query, input_precision=PRECISION) - bar[None, :]
        best = tl.max(tl.reshape(score, (KEYS, GROUPS, LISTS)), 1)
        wide = x.to(tl.float32)
        extra = DEVIATIONS * tl.sqrt(tl.dot((wide * wide).to(x.dtype), spread, input_precision=PRECISION))
        if WITHIN:
            variance = tl.load(variance_ptr + (key_at + key)[:, None] * DIM + column, mask=read, other=0.0)
            extra = tl.dot(variance, tl.trans(half), extra, input_precision=PRECISION)
        log_value = tl.load(log_value_ptr + key_at + key, mask=key < count, other=0.0)
        log_share = best + extra + log_value[:, None]
        share = tl.exp2(tl.minimum(log_share, 0.0) * 1.4426950408889634)
        tl.store(share_at + key[:, None], share.to(share_ptr.dtype.element_ty), mask=key[:, None] < known[None, :])


def empty_shares(query: Tensor, num: int) -> Tensor:
    """Make memory for shares, ``[lists, tiles * many, room]``: `num` places for each list of queries, and a few more.

    Args:
        query: as for `alike_shares`.
        num: leading blocks that may be known.

    Returns:
        the memory, in bfloat16, whose range is that of float32; in the dtype of the averages where these are wider.
    """
    return query.new_empty(query.shape[0], query.shape[1] * query.shape[2], -(-num // _ALIGNED) * _ALIGNED)


def alike_shares(
    query: Tensor,
    bar: Tensor,
    spread: Tensor,
    keys: Tensor,
    variance: Tensor | None,
    log_value: Tensor,
    edges: Tensor,
    size: int,
    num: int,
    deviations: float,
) -> Tensor:
    """Estimate the largest share that a query of each list gives a key of each block: see `AlikeScan.shares`.

    Args:
        query: averages of each group, ``[lists, tiles, many, groups, width]``.
        bar: what each average's scores are compared with, ``[lists, tiles, many, groups]``, float32.
        spread: what averages leave out, ``[lists, tiles, many, width]``; beside half of their squares at least where there
            are variances.
        keys: means of blocks, ``[lists, blocks, width]``.
        variance: variances inside blocks, of the same shape; None for blocks of one key.
        log_value: logarithm of how far values lie, ``[lists, blocks]``, float32.
        edges: edges of each tile, the last of which counts the keys that it may score, ``[lists, tiles, 5]``.
        size: keys in a block.
        num: a bound of the blocks that tiles may score.
        deviations: deviations by which a query may exceed the average of its group.

    Returns:
        ``[lists, tiles * many, room]``, undefined from the blocks on that a tile does not know.
    """
    share = empty_shares(query, num)
    if share.numel():
        launch_shares(query, bar, spread, keys, variance, log_value, edges, share, size, deviations).run()
    return share


def launch_shares(
    query: Tensor, bar: Tensor, spread: Tensor, keys: Tensor, variance: Tensor | None, log_value: Tensor, edges: Tensor,
    share: Tensor, size: int, deviations: float,
) -> Launch:  # fmt: skip
    """Prepare the launch of `alike_shares`, which writes into `share`."""
    many, groups, width = query.shape[2:]
    # tiles may be some of many, but the lists of a tile stand together
    query = query if query[:1].is_contiguous() else query.contiguous()
    padded, broad = triton.next_power_of_2(groups), max(16, triton.next_power_of_2(width))
    # queries, and keys that are on their way, share the memory of a multiprocessor
    lists = max(8, min(_MOST_LISTS, _ROWS // padded) // triton.cdiv(broad, 128))
    crowded = variance is not None
    # half as many keys for each: several tensors of wide keys, and many wide averages
    fewer = (1 + (crowded and broad > 128)) * (1 + (padded * broad > 2048))
    keys = keys.contiguous()
    return Launch(
        _kernel,
        (triton.cdiv(share.shape[1], lists), query.shape[0]),
        {
            "query_ptr": query, "bar_ptr": bar.contiguous(), "spread_ptr": spread.contiguous(), "keys_ptr": keys,
            "variance_ptr": keys if variance is None else variance.contiguous(), "log_value_ptr": log_value.contiguous(),
            "edges_ptr": edges, "size": size, "s_edges": edges.stride(0), "EDGES": edges.shape[2],
            "share_ptr": share, "lists": share.shape[1], "blocks": keys.shape[1],
            "room": share.shape[2], "s_query": query.stride(0), "MANY": many, "OF_LIST": groups, "DIM": width,
            "MOMENTS": spread.shape[3], "DEVIATIONS": deviations, "WITHIN": crowded, "LISTS": lists, "GROUPS": padded,
            "WIDTH": broad,
            "KEYS": _KEYS // fewer,
            # estimates are in bfloat16; only tests have wider ones
            "PRECISION": "ieee", "num_warps": 4, "num_stages": 2 if crowded or broad > 128 else 3,
        },
    )  # fmt: skip
