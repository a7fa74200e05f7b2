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


@triton.jit
def _edge(level, first, GROWTH: tl.constexpr):
    """Count the leading keys of a covariance."""
    edge = first
    for _ in tl.range(0, level):
        edge *= GROWTH
    return edge


@triton.jit
def _sums_kernel(
    k_ptr, centre_ptr, products_ptr, sums_ptr, first, levels, s_list, s_key, s_centre,
    GROWTH: tl.constexpr, SLICES: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    part, level, one = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = tl.arange(0, WIDTH)
    end = _edge(level, first, GROWTH)
    begin = tl.where(level == 0, 0, end // GROWTH)
    # the same keys in the same order whatever follows them
    each = tl.cdiv(tl.cdiv(end - begin, SLICES), KEYS) * KEYS
    begin += part * each
    end = tl.minimum(end, begin + each)
    centre = tl.load(centre_ptr + one * s_centre + column, mask=column < DIM, other=0.0)
    products, sums = tl.zeros([WIDTH, WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for at in tl.range(begin, end, KEYS):
        key = at + tl.arange(0, KEYS)
        read = (key < end)[:, None] & (column < DIM)[None, :]
        x = tl.load(k_ptr + one * s_list + key.to(tl.int64)[:, None] * s_key + column[None, :], mask=read, other=0.0)
        x = tl.where(read, _finite(x.to(tl.float32) - centre[None, :]), 0.0)
        products = tl.dot(tl.trans(x), x, products, input_precision=PRECISION)
        sums += tl.sum(x, 0)
    at = (one * levels + level) * SLICES + part
    tl.store(products_ptr + (at * WIDTH + column)[:, None] * WIDTH + column[None, :], products)
    tl.store(sums_ptr + at * WIDTH + column, sums)


@triton.jit
def _factor_kernel(
    products_ptr, sums_ptr, factor_ptr, first, levels, ridge,
    GROWTH: tl.constexpr, SLICES: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    number, one = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, WIDTH)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    along = tl.arange(0, WIDTH)
    total, sums = tl.zeros([WIDTH, WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    # the first factor is the identity
    for part in tl.range(0, number * SLICES):
        at = one * levels * SLICES + part
        total += tl.load(products_ptr + (at * WIDTH + row) * WIDTH + column)
        sums += tl.load(sums_ptr + at * WIDTH + along)
    count = _edge(tl.maximum(number - 1, 0), first, GROWTH).to(tl.float32)
    # the mean in both layouts, without a product of the device
    across = tl.sum(tl.where(row == column, sums[None, :], 0.0), 1)
    total = total / count - (across / count)[:, None] * (sums / count)[None, :]
    variance = tl.sum(tl.sum(tl.where(row == column, total, 0.0), 1), 0) / DIM
    # relative to the mean variance; what pads the matrix stands apart from the rest
    total = tl.where((row < DIM) & (column < DIM), total / tl.maximum(variance, 1e-37), 0.0)
    total += tl.where(row == column, tl.where(row < DIM, ridge, 1.0), 0.0)
    for at in tl.range(0, DIM):
        # what is left is symmetric: its column and its row are the same numbers in two layouts
        down = tl.sum(tl.where(column == at, total, 0.0), 1)
        right = tl.sum(tl.where(row == at, total, 0.0), 0)
        pivot = tl.sum(tl.where(along == at, down, 0.0), 0)
        # rounding may leave less than the ridge, which is the least that there is
        inverse = 1.0 / tl.sqrt(tl.maximum(pivot, ridge))
        down = tl.where(along > at, down, tl.where(along == at, tl.maximum(pivot, ridge), 0.0)) * inverse
        right = tl.where(along > at, right, 0.0) * inverse
        left = total - down[:, None] * right[None, :]
        total = tl.where(column > at, left, tl.where(column == at, down[:, None], total))
    total = tl.where(row >= column, total, 0.0)
    # keys so large that their products are not finite tell nothing
    wrong = tl.sum(tl.sum(tl.where(tl.abs(total) < float("inf"), 0, 1), 1), 0) > 0
    total = tl.where(wrong | (number == 0), tl.where(row == column, 1.0, 0.0), total)
    out = factor_ptr + ((one * (levels + 1) + number) * DIM + row) * DIM + column
    tl.store(out, total, mask=(row < DIM) & (column < DIM))


def key_factors(k: Tensor, centres: Tensor, first: int, growth: int, ridge: float) -> Tensor:
    """Factor the covariances of `first`, `growth` times `first`, ... leading keys: see `KeyMetric.of`.

    Args:
        k: keys, ``[lists, keys, width]``, up to 128 wide.
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
    width, slices = max(16, triton.next_power_of_2(dim)), max(1, min(_MOST_SLICES, _PROGRAMS // max(1, lists)))
    products = centres.new_empty(max(1, lists * levels * slices), width, width)
    sums = centres.new_empty(max(1, lists * levels * slices), width)
    shared = {
        "products_ptr": products, "sums_ptr": sums, "first": first, "levels": levels, "GROWTH": growth, "SLICES": slices,
        "DIM": dim, "WIDTH": width,
    }  # fmt: skip
    add = Launch(
        _sums_kernel,
        (slices, levels, lists),
        {
            "k_ptr": k, "centre_ptr": centres, **shared, "s_list": k.stride(0), "s_key": k.stride(1),
            "s_centre": centres.stride(0), "KEYS": _KEYS,
            # the smallest variances would be lost in the rounding of a single product of the tensor cores
            "PRECISION": "ieee" if torch.version.hip else "tf32x3", "num_warps": 8, "num_stages": 2,
        },
    )  # fmt: skip
    factors = Launch(_factor_kernel, (1 + levels, lists), {**shared, "factor_ptr": factor, "ridge": ridge, "num_warps": 8})
    return (add, factors) if levels else (factors,)
