"""Draw keys from masses of leaves in Triton: clip, add the uniform share, sum, and invert, in one launch for all tiles.

`select.score.leaves` computes the same in thirty passes over tiles x leaves; here a program holds the leaves of one tile.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch


@triton.jit
def _kernel(
    first_ptr, size_ptr, mass_ptr, alive_ptr, count_ptr, offset_ptr, index_ptr, share_ptr,
    leaves, opened, num, uniform_share, least,
    CLIP_ROUNDS: tl.constexpr, LEAVES: tl.constexpr, STEPS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    leaf = tl.arange(0, LEAVES)
    there, is_opened = leaf < leaves, leaf < opened
    alive = tl.load(alive_ptr + tile * leaves + leaf, mask=there, other=0).to(tl.float32)
    size = tl.load(size_ptr + leaf, mask=there, other=1).to(tl.float32)
    certain = tl.sum(tl.where(is_opened, alive, 0.0), 0)
    # keys in closed blocks; if there are none, opened keys share all draws
    count = tl.load(count_ptr + tile).to(tl.float32) - certain
    whole = num / tl.maximum(certain, 1.0)
    each = tl.where(count > 0, tl.minimum(0.5 * whole, 1.0), whole)
    rest = num - each * certain
    is_closed = there & (leaf >= opened)
    mass = tl.load(mass_ptr + tile * (leaves - opened) + leaf - opened, mask=is_closed, other=0.0)
    # dead leaves and masses that are not finite have weight 0
    mass = tl.where((alive > 0) & (mass < float("inf")) & (mass > 0), mass, 0.0)
    even, weighted = uniform_share * rest / tl.maximum(count, 1.0), (1 - uniform_share) * rest
    for _ in tl.static_range(CLIP_ROUNDS):
        mass = tl.minimum(mass, size * (tl.sum(mass, 0) / tl.maximum(weighted, least)))
    mass = mass * (weighted / tl.maximum(tl.sum(mass, 0), least)) + tl.where(is_closed, alive * size * even, 0.0)
    mass = mass * (rest / tl.maximum(tl.sum(mass, 0), least))
    listings = tl.where(is_opened, alive * each, mass)

    # in fixed point, whose running sums never decrease; floating-point sums in a tree may, by one rounding step
    total = tl.sum(listings, 0)
    unit = tl.where(total > 0, 1073741824.0 / total, 0.0)
    running = tl.cumsum((listings * unit).to(tl.int32), 0).to(tl.float32)
    running = tl.where(total > 0, running / unit, 0.0)
    total = tl.max(running, 0)
    offset = tl.load(offset_ptr + tile).to(tl.float32)
    # points below the end of each leaf; all points are below the end of the last leaf with positive mass
    passed = tl.ceil(running / total * num - offset * num)
    passed = tl.where(passed > 0, tl.minimum(passed, num), 0.0)
    passed = tl.where((running >= total) | (leaf >= leaves - 1), num, passed)
    slot = tl.arange(0, SLOTS)
    at = tl.zeros([SLOTS], tl.int32)
    # number of leaves before each point, by bisection: STEPS halvings of LEAVES
    for step in tl.static_range(STEPS):
        at += tl.where(tl.gather(passed, at + (LEAVES >> (step + 1)) - 1, 0) <= slot, LEAVES >> (step + 1), 0)
    own = tl.gather(listings, at, 0)
    inside = ((offset + slot / num) * total - tl.gather(running, at, 0) + own) / tl.maximum(own, 1e-38)
    inside = tl.minimum(tl.maximum(inside, 0.0), 1 - 1.1920929e-07)
    of_leaf = tl.gather(size, at, 0)
    wanted = slot < num
    first = tl.load(first_ptr + tile * leaves + at, mask=wanted, other=0)
    to = tile * num + slot
    tl.store(index_ptr + to, first + (inside * of_leaf).to(tl.int64), mask=wanted)
    tl.store(share_ptr + to, own / (of_leaf * num), mask=wanted)


def draw_leaves(
    first: Tensor,
    size: Tensor,
    mass: Tensor,
    alive: Tensor,
    count: Tensor,
    offset: Tensor,
    num: int,
    uniform_share: float,
    clip_rounds: int,
    least: float,
) -> tuple[Tensor, Tensor]:
    """Draw keys from leaves: see `select.score.leaves`.

    Args:
        first: first key of each leaf, opened keys before closed blocks, ``[lists, tiles, leaves]``.
        size: number of keys in each leaf, ``[leaves]``.
        mass: estimated weight of each closed block, ``[lists, tiles, closed]``.
        alive: which leaves exist, ``[lists, tiles, leaves]``.
        count: number of remaining keys of each tile, ``[lists, tiles]``.
        offset: the first of evenly spaced points, in [0, 1 / num), ``[lists, tiles]``.
        num: number of draws.
        uniform_share: share of the draws on closed blocks that is spread uniformly.
        clip_rounds: rounds of clipping.
        least: sums below this count as 0.

    Returns:
        keys, and their probabilities in a single draw, ``[lists, tiles, num]``.
    """
    index = first.new_empty((*first.shape[:2], num))
    share = mass.new_empty(index.shape)
    if index.numel():
        launch_draw(first, size, mass, alive, count, offset, (index, share), uniform_share, clip_rounds, least).run()
    return index, share


def launch_draw(
    first: Tensor,
    size: Tensor,
    mass: Tensor,
    alive: Tensor,
    count: Tensor,
    offset: Tensor,
    results: tuple[Tensor, Tensor],
    uniform_share: float,
    clip_rounds: int,
    least: float,
) -> Launch:
    """Prepare the launch of `draw_leaves`, which writes keys and probabilities into `results`."""
    leaves, num = first.shape[2], results[0].shape[2]
    padded = max(16, triton.next_power_of_2(leaves))
    return Launch(
        _kernel,
        (first.shape[0] * first.shape[1],),
        {
            "first_ptr": first.contiguous(), "size_ptr": size.contiguous(), "mass_ptr": mass.contiguous(),
            "alive_ptr": alive.contiguous().view(torch.uint8), "count_ptr": count.contiguous(),
            "offset_ptr": offset.contiguous(), "index_ptr": results[0], "share_ptr": results[1],
            "leaves": leaves, "opened": leaves - mass.shape[2], "num": num, "uniform_share": uniform_share, "least": least,
            "CLIP_ROUNDS": clip_rounds, "LEAVES": padded, "STEPS": padded.bit_length() - 1,
            "SLOTS": max(16, triton.next_power_of_2(num)), "num_warps": 4 if padded <= 1024 else 8,
        },
    )  # fmt: skip
