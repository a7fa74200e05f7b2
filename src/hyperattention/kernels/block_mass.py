"""Masses of blocks as operators of torch, for GPUs: compilers see one node each. On a CPU `Walk` works in batches."""

import torch
from torch import Tensor


@torch.library.custom_op("hyperattention::block_lse", mutates_args=())
def block_lse(query: Tensor, moments: Tensor, edges: Tensor, number: int, size: int) -> Tensor:
    """See `block_mass_triton.block_lse`."""
    from hyperattention.kernels import block_mass_triton

    return block_mass_triton.block_lse(query, moments, edges, number, size)


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
    """See `block_mass_triton.block_mass`."""
    from hyperattention.kernels import block_mass_triton

    return block_mass_triton.block_mass(query, summary, first, edges, lse, number, size, cut, (means, far))


@block_mass.register_fake
def _(query, summary, first, edges, lse, number, *rest):
    return query.new_empty((*query.shape[:2], number), dtype=torch.float32)
