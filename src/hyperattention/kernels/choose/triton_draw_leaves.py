"""Draw keys from masses of leaves in Triton: clip, add the uniform share, sum, and invert, in one launch for all tiles.

`select.score.leaves` computes the same in thirty passes over tiles x leaves; here a program holds the leaves of one tile.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.launch import Launch


@triton.jit
def _leaf(firsts, leaf, at, counts, opened, SIZES: tl.constexpr, EVERY: tl.constexpr):
    """Return the first key of some leaves, and how many each has."""
    first, size, begin = leaf.to(tl.int64) * 0, leaf * 0 + 1, 0
    for g in tl.static_range(len(SIZES)):
        own = leaf - begin
        inside = (own >= 0) & (own < counts[g])
        if EVERY[g]:
            first = tl.where(inside, own.to(tl.int64) * SIZES[g], first)
        else:
            first = tl.where(inside, tl.load(firsts[g] + at * counts[g] + own, mask=inside, other=0), first)
        size = tl.where(inside, SIZES[g], size)
        begin += counts[g]
    return first, size


@triton.jit
def _kernel(
    firsts, masses, alives, counts, edges_ptr, noise_ptr, index_ptr, weight_ptr,
    leaves, opened, num, uniform_share, least, s_edges, s_noise, s_index, s_weight,
    SIZES: tl.constexpr, EVERY: tl.constexpr, EDGES: tl.constexpr, FINAL: tl.constexpr,
    CLIP_ROUNDS: tl.constexpr, LEAVES: tl.constexpr, STEPS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    tile, one = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at_tile = one * tl.num_programs(0) + tile
    edges_ptr += one * s_edges + tile * EDGES
    begin, hole_begin = tl.load(edges_ptr), tl.load(edges_ptr + 1)
    hole_end, end = tl.load(edges_ptr + 2), tl.load(edges_ptr + 3)
    left = hole_begin - begin + end - hole_end
    leaf = tl.arange(0, LEAVES)
    there, is_opened = leaf < leaves, leaf < opened
    key, size = _leaf(firsts, leaf, at_tile, counts, opened, SIZES, EVERY)
    size = size.to(tl.float32)
    # opened keys that earlier stages left
    alive = tl.where(is_opened & (((key >= begin) & (key < hole_begin)) | ((key >= hole_end) & (key < end))), 1.0, 0.0)
    mass, since = tl.zeros([LEAVES], tl.float32), opened
    for g in tl.static_range(1, len(SIZES)):
        own = leaf - since
        inside = (own >= 0) & (own < counts[g])
        alive = tl.where(inside, tl.load(alives[g] + at_tile * counts[g] + own, mask=inside, other=0).to(tl.float32), alive)
        mass = tl.where(inside, tl.load(masses[g] + at_tile * counts[g] + own, mask=inside, other=0.0), mass)
        since += counts[g]
    certain = tl.sum(alive * is_opened.to(tl.float32), 0)
    # keys in closed blocks; if there are none, opened keys share all draws
    count = left.to(tl.float32) - certain
    whole = num / tl.maximum(certain, 1.0)
    each = tl.where(count > 0, tl.minimum(0.5 * whole, 1.0), whole)
    rest = num - each * certain
    is_closed = there & (leaf >= opened)
    # dead leaves and masses that are not finite have weight 0
    mass = tl.where((alive > 0) & is_closed & (mass < float("inf")) & (mass > 0), mass, 0.0)
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
    offset = (tl.load(noise_ptr + one * s_noise + tile) / num).to(tl.float32)
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
    inside = ((offset + slot / num) * total - tl.gather(running, at, 0) + own) / tl.maximum(own, 1.1754943508222875e-38)
    inside = tl.minimum(tl.maximum(inside, 0.0), 1 - 1.1920929e-07)
    first, size = _leaf(firsts, at, at_tile, counts, opened, SIZES, EVERY)
    index = first + (inside * size.to(tl.float32)).to(tl.int64)
    weight = own / (size.to(tl.float32) * num)
    if FINAL:
        # a leaf of no probability is drawn where there is none of any: an empty slot
        weight = tl.where(own == 0, -float("inf"), -tl.log(weight * num))
        # all that is left is listed, where it is no more than the draws
        few = left <= num
        listed = begin + tl.minimum(slot, tl.maximum(left - 1, 0))
        listed += tl.where(listed >= hole_begin, hole_end - hole_begin, 0)
        index = tl.where(few, listed, index)
        weight = tl.where(few, tl.where(slot < left, 0.0, -float("inf")), weight)
    tl.store(index_ptr + one * s_index + tile * num + slot, index, mask=slot < num)
    tl.store(weight_ptr + one * s_weight + tile * num + slot, weight, mask=slot < num)


def launch_draw(
    leaves: Sequence[tuple[Tensor | None, Tensor, Tensor]], sizes: Sequence[int], opened: int, edges: Tensor, noise: Tensor,
    results: tuple[Tensor, Tensor], uniform_share: float, clip_rounds: int, least: float, *, final: bool,
) -> Launch:  # fmt: skip
    """Prepare the launch of `operator_search.draw_leaves`, which writes into `results`."""
    index, weight = results
    firsts, masses, alives = zip(*leaves, strict=True)
    counts = (opened, *(x.shape[2] for x in masses[1:]))
    num, padded = index.shape[2], max(16, triton.next_power_of_2(sum(counts)))
    return Launch(
        _kernel,
        (index.shape[1], index.shape[0]),
        {
            "firsts": tuple(index if x is None else x for x in firsts), "masses": tuple(masses), "alives": tuple(alives),
            "counts": counts, "edges_ptr": edges, "noise_ptr": noise, "index_ptr": index, "weight_ptr": weight,
            "leaves": sum(counts), "opened": opened, "num": num, "uniform_share": uniform_share, "least": least,
            "s_edges": edges.stride(0), "s_noise": noise.stride(0), "s_index": index.stride(0),
            "s_weight": weight.stride(0), "SIZES": tuple(sizes), "EVERY": tuple(x is None for x in firsts),
            "EDGES": edges.shape[2], "FINAL": final, "CLIP_ROUNDS": clip_rounds, "LEAVES": padded,
            "STEPS": padded.bit_length() - 1, "SLOTS": max(16, triton.next_power_of_2(num)),
            "num_warps": 4 if padded <= 1024 else 8,
        },
    )  # fmt: skip
