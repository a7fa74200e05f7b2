"""Factors of covariances of leading keys in Triton: one launch sums up products of keys, one adds the sums up and factors.

`select.score.key_metric` does the same in PyTorch, in some dozens of launches.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.choose.triton_sort_alike import _finite
from hyperattention.kernels.launch import Launch

# keys read at once, and programs that share the keys of one covariance: fewer where there are many lists, so that their sums
# take little memory
_KEYS, _MOST_SLICES, _PROGRAMS = 32, 16, 512
# rows and columns of the products that a program sums up, and columns of a covariance that are factored at once
_BLOCK, _PANEL = 128, 32


@triton.jit
def _edge(level, first, GROWTH: tl.constexpr):
    """Count the leading keys of a covariance."""
    edge = first
    for _ in tl.range(0, level):
        edge *= GROWTH
    return edge


@triton.jit
def _centred(k_ptr, centre_ptr, key, end, s_key, column, DIM: tl.constexpr):
    """Read some numbers of some keys, without their mean over the first keys."""
    read = (key < end)[:, None] & (column < DIM)[None, :]
    centre = tl.load(centre_ptr + column, mask=column < DIM, other=0.0)
    x = tl.load(k_ptr + key.to(tl.int64)[:, None] * s_key + column[None, :], mask=read, other=0.0)
    return tl.where(read, _finite(x.to(tl.float32) - centre[None, :]), 0.0)


@triton.jit
def _sums_kernel(
    k_ptr, centre_ptr, products_ptr, sums_ptr, first, levels, s_list, s_key, s_centre,
    GROWTH: tl.constexpr, SLICES: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part, level, one = tl.program_id(0) % SLICES, tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    below, number = 0, 0
    if WIDTH > BLOCK:
        # blocks on the diagonal and below it, row by row
        number = tl.program_id(0) // SLICES
        while number > below:
            below += 1
            number -= below
        row, column = row + below * BLOCK, column + number * BLOCK
    end = _edge(level, first, GROWTH)
    begin = tl.where(level == 0, 0, end // GROWTH)
    # the same keys in the same order whatever follows them
    each = tl.cdiv(tl.cdiv(end - begin, SLICES), KEYS) * KEYS
    begin += part * each
    end = tl.minimum(end, begin + each)
    k_ptr += one * s_list
    centre_ptr += one * s_centre
    products, sums = tl.zeros([BLOCK, BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for at in tl.range(begin, end, KEYS):
        key = at + tl.arange(0, KEYS)
        x = _centred(k_ptr, centre_ptr, key, end, s_key, column, DIM)
        y = _centred(k_ptr, centre_ptr, key, end, s_key, row, DIM) if WIDTH > BLOCK else x
        products = tl.dot(tl.trans(y), x, products, input_precision=PRECISION)
        sums += tl.sum(x, 0)
    at = (one * levels + level) * SLICES + part
    tl.store(products_ptr + (at * WIDTH + row)[:, None] * WIDTH + column[None, :], products)
    if below == number:
        tl.store(sums_ptr + at * WIDTH + column, sums)


@triton.jit
def _panel_of(factor_ptr, row, column, DIM: tl.constexpr):
    """Read some rows and columns of a factor, as far as they are written."""
    inside = (row < DIM)[:, None] & (column < DIM)[None, :] & (row[:, None] >= column[None, :])
    return tl.load(factor_ptr + row[:, None] * DIM + column[None, :], mask=inside, other=0.0)


@triton.jit
def _factored(panel, row, begin, count, ridge, PANEL: tl.constexpr):
    """Factor the columns from `begin` on, of which all earlier ones are subtracted, one after the other."""
    number, along = tl.arange(0, PANEL)[None, :], row[:, None]
    for at in tl.range(0, count):
        # what is left is symmetric: its column and its row are the same numbers in two layouts
        down = tl.sum(tl.where(number == at, panel, 0.0), 1)
        right = tl.sum(tl.where(along == begin + at, panel, 0.0), 0)
        # the ridge is the least that there is: where rounding leaves less, all that is left of the column is rounding, which
        # would be divided by it, and grow from column to column
        pivot = tl.sum(tl.where(row == begin + at, down, 0.0), 0)
        inverse = 1.0 / tl.sqrt(tl.maximum(pivot, ridge))
        below = tl.where(pivot >= ridge, inverse, 0.0)
        down = tl.where(row > begin + at, down * below, tl.where(row == begin + at, 1.0 / inverse, 0.0))
        left = panel - down[:, None] * (right * inverse)[None, :]
        panel = tl.where(number > at, left, tl.where(number == at, down[:, None], panel))
    return panel


@triton.jit
def _factor_kernel(
    products_ptr, sums_ptr, factor_ptr, first, levels, ridge,
    GROWTH: tl.constexpr, SLICES: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PANEL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    number, one = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, inside = tl.arange(0, WIDTH), tl.arange(0, PANEL)
    factor_ptr += (one * (levels + 1) + number) * DIM * DIM
    products_ptr += one * levels * SLICES * WIDTH * WIDTH
    sums_ptr += one * levels * SLICES * WIDTH
    # the first factor is the identity
    parts = number * SLICES
    count = _edge(tl.maximum(number - 1, 0), first, GROWTH).to(tl.float32)
    variance, mean = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for part in tl.range(0, parts):
        variance += tl.load(products_ptr + part * WIDTH * WIDTH + row * (WIDTH + 1))
        mean += tl.load(sums_ptr + part * WIDTH + row) / count
    variance = tl.sum(variance / count - mean * mean, 0) / DIM
    wrong = number * 0
    for begin in tl.range(0, DIM, PANEL):
        column = begin + inside
        lower = row[:, None] >= column[None, :]
        panel, across = tl.zeros([WIDTH, PANEL], tl.float32), tl.zeros([PANEL], tl.float32)
        for part in tl.range(0, parts):
            at = part * WIDTH * WIDTH + row[:, None] * WIDTH + column[None, :]
            panel += tl.load(products_ptr + at, mask=row[:, None] >= begin, other=0.0)
            across += tl.load(sums_ptr + part * WIDTH + column) / count
        # relative to the mean variance; what pads the matrix stands apart from the rest
        panel = (panel / count - mean[:, None] * across[None, :]) / tl.maximum(variance, 1e-37)
        panel = tl.where((row < DIM)[:, None] & (column < DIM)[None, :], panel, 0.0)
        panel += tl.where(row[:, None] == column[None, :], tl.where(row < DIM, ridge, 1.0)[:, None], 0.0)
        for before in tl.range(0, begin, PANEL, num_stages=1):
            earlier = _panel_of(factor_ptr, row, before + inside, DIM)
            own = _panel_of(factor_ptr, column, before + inside, DIM)
            panel -= tl.dot(earlier, tl.trans(own), input_precision=PRECISION)
        panel = _factored(panel, row, begin, tl.minimum(DIM - begin, PANEL), ridge, PANEL)
        wrong += tl.sum(tl.sum(tl.where(lower & ~(tl.abs(panel) < float("inf")), 1, 0), 1), 0)
        out_at = factor_ptr + row[:, None] * DIM + column[None, :]
        tl.store(out_at, tl.where(lower, panel, 0.0), mask=(row < DIM)[:, None] & (column < DIM)[None, :])
        # what is written is read by other threads
        tl.debug_barrier()
    # keys so large that their products are not finite tell nothing
    if (wrong > 0) | (number == 0):
        for begin in tl.range(0, DIM, PANEL):
            column = begin + inside
            one_of = tl.where(row[:, None] == column[None, :], 1.0, 0.0)
            out_at = factor_ptr + row[:, None] * DIM + column[None, :]
            tl.store(out_at, one_of, mask=(row < DIM)[:, None] & (column < DIM)[None, :])


def key_factors(k: Tensor, centres: Tensor, first: int, growth: int, ridge: float) -> Tensor:
    """Factor the covariances of `first`, `growth` times `first`, ... leading keys: see `KeyMetric.of`.

    Args:
        k: keys, ``[lists, keys, width]``, up to 256 wide.
        centres: mean of the first keys, and more numbers behind it, ``[lists, at least width]``, float32.
        first: leading keys of the first covariance.
        growth: how many times as many the next one has.
        ridge: added to the diagonal, relative to the mean variance.

    Returns:
        the identity, then a factor for each covariance, ``[lists, 1 + covariances, width, width]``, float32.
    """
    levels, edge = 0, first
    while edge <= k.shape[1]:
        levels, edge = levels + 1, edge * growth
    factor = centres.new_empty(k.shape[0], 1 + levels, k.shape[2], k.shape[2])
    if factor.numel():
        for launch in launches_of_factors(k, centres, factor, first, growth, ridge):
            launch.run()
    return factor


def launches_of_factors(
    k: Tensor, centres: Tensor, factor: Tensor, first: int, growth: int, ridge: float
) -> tuple[Launch, ...]:
    """Prepare the launches of `key_factors`, which write into `factor`: one where there is only the identity."""
    k = k if k.stride(2) == 1 else k.contiguous()
    lists, levels, dim = k.shape[0], factor.shape[1] - 1, k.shape[2]
    width = max(16, triton.next_power_of_2(dim))
    block, panel = min(width, _BLOCK), min(width, _PANEL)
    # what fewer programs sum up longer is read sooner; wide keys have more programs for each slice
    slices, blocks = max(1, min(_MOST_SLICES * block // width, _PROGRAMS // max(1, lists))), width // block
    products = centres.new_empty(max(1, lists * levels * slices), width, width)
    sums = centres.new_empty(max(1, lists * levels * slices), width)
    shared = {
        "products_ptr": products, "sums_ptr": sums, "first": first, "levels": levels, "GROWTH": growth, "SLICES": slices,
        "DIM": dim, "WIDTH": width,
        # the smallest variances would be lost in the rounding of a single product of the tensor cores
        "PRECISION": "ieee" if torch.version.hip else "tf32x3",
    }  # fmt: skip
    add = Launch(
        _sums_kernel,
        (slices * (blocks * (blocks + 1) // 2), levels, lists),
        {
            "k_ptr": k, "centre_ptr": centres, **shared, "s_list": k.stride(0), "s_key": k.stride(1),
            "s_centre": centres.stride(0), "BLOCK": block, "KEYS": _KEYS, "num_warps": 8, "num_stages": 2,
        },
    )  # fmt: skip
    factors = Launch(
        _factor_kernel,
        (1 + levels, lists),
        {**shared, "factor_ptr": factor, "ridge": ridge, "PANEL": panel, "num_warps": 4 if width <= 128 else 8},
    )
    return (add, factors) if levels else (factors,)
