"""The choice of keys as torch operators for GPUs: compilers see one node each. On a CPU `Walk` and `Leaves` run instead."""

import torch
from torch import Tensor

from hyperattention.transforms import refuse_vmap

# largest number of pooled queries of a tile that a program holds; with more of them PyTorch runs
MOST_ROWS = 256
# largest number of averages of a list of alike queries, and of numbers in them, that fit a program with those of eight lists
_MOST_GROUPS, _MOST_NUMBERS = 16, 4096


def scores_alike(groups: int, width: int) -> bool:
    """Return whether a kernel scores keys by so many averages of a list of alike queries; PyTorch does by more.

    Args:
        groups: averages of a list.
        width: numbers in an average.

    Returns:
        whether `choose_alike` supports them; numbers are padded to powers of two.
    """
    padded = 1 << (max(1, groups) - 1).bit_length(), 1 << (max(1, width) - 1).bit_length()
    return padded[0] <= _MOST_GROUPS and padded[0] * padded[1] <= _MOST_NUMBERS


@torch.library.custom_op("hyperattention::block_lse", mutates_args=())
def block_lse(query: Tensor, moments: Tensor, edges: Tensor, number: int, size: int) -> Tensor:
    """See `triton_block_mass.block_lse`."""
    from hyperattention.kernels.choose import triton_block_mass

    return triton_block_mass.block_lse(query, moments, edges, number, size)


@block_lse.register_fake
def _(query, moments, edges, number, size):
    return query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hyperattention::block_mass", mutates_args=())
def block_mass(
    query: Tensor,
    summary: Tensor,
    first: Tensor | None,
    edges: Tensor,
    lse: Tensor,
    number: int,
    size: int,
    cut: int,
    means: int,
    far: int,
) -> Tensor:
    """See `triton_block_mass.block_mass`."""
    from hyperattention.kernels.choose import triton_block_mass

    return triton_block_mass.block_mass(query, summary, first, edges, lse, number, size, cut, (means, far))


@block_mass.register_fake
def _(query, summary, first, edges, lse, number, *rest):
    return query.new_empty((*query.shape[:2], number), dtype=torch.float32)


@torch.library.custom_op("hyperattention::prepare_keys", mutates_args=())
def prepare_keys(k: Tensor, middle: Tensor, basis: Tensor | None, room: int) -> Tensor:
    """See `triton_prepare.prepare_keys`."""
    from hyperattention.kernels.choose import triton_prepare

    return triton_prepare.prepare_keys(k, middle, basis, room)


@prepare_keys.register_fake
def _(k, middle, basis, room):
    return middle.new_empty((k.shape[0], room, k.shape[2] if basis is None else basis.shape[2]))


@torch.library.custom_op("hyperattention::prepare_queries", mutates_args=())
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
    """See `triton_prepare.prepare_queries`."""
    from hyperattention.kernels.choose import triton_prepare

    return triton_prepare.prepare_queries(q, basis, dtype, tiles, first_tile, size, pooled, offset, kv_heads, scale)


@prepare_queries.register_fake
def _(q, basis, dtype, tiles, first_tile, size, pooled, offset, kv_heads, scale):
    each = -(-size // min(pooled, size))
    lists, group = q.shape[0] * kv_heads, q.shape[1] // kv_heads
    width = q.shape[3] if basis is None else basis.shape[2]
    return q.new_empty((lists, tiles, group * -(-size // each), width), dtype=dtype)


for _operator in (block_lse, block_mass, prepare_keys, prepare_queries):
    refuse_vmap(_operator, "choosing keys")
