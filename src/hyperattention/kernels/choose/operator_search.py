"""A hierarchical search as torch operators for GPUs, beside those in `operator`: see there."""

import torch
from torch import Tensor

from hyperattention.transforms import refuse_vmap


@torch.library.custom_op("hyperattention::uniform_of_tiles", mutates_args=())
def uniform_of_tiles(heads: Tensor | None, index: Tensor, batch: int, kv_heads: int, state: int, last: int) -> Tensor:
    """Hash a counter for each kv head, each tile's number, and a last counter into a state.

    Args:
        heads: the kv heads' numbers in their layer; None for all, in order.
        index: numbers of the tiles.
        batch: batch rows, which are alike.
        kv_heads: number of kv heads.
        state: what the counters before them were hashed to.
        last: the last counter; none if it is negative.

    Returns:
        numbers in [0, 1), ``[batch * kv_heads, tiles]``, float64.
    """
    from hyperattention.kernels.choose import triton_uniform

    out = index.new_empty((batch, kv_heads, len(index)), dtype=torch.float64)
    if out.numel():
        triton_uniform.launch_uniform(heads, index, out, state, last).run()
    return out.flatten(0, 1)


@uniform_of_tiles.register_fake
def _(heads, index, batch, kv_heads, state, last):
    return index.new_empty((batch * kv_heads, len(index)), dtype=torch.float64)


@torch.library.custom_op("hyperattention::uniform_of_counters", mutates_args=())
def uniform_of_counters(like: Tensor, count: int, state: int) -> Tensor:
    """Hash the counters from 0 on into a state.

    Args:
        like: a tensor on the device of the result.
        count: how many there are.
        state: what the counters before them were hashed to.

    Returns:
        numbers in [0, 1), float64.
    """
    from hyperattention.kernels.choose import triton_uniform

    out = like.new_empty(count, dtype=torch.float64)
    if count:
        triton_uniform.launch_counted(out, state).run()
    return out


@uniform_of_counters.register_fake
def _(like, count, state):
    return like.new_empty(count, dtype=torch.float64)


@torch.library.custom_op("hyperattention::key_basis", mutates_args=())
def key_basis(k: Tensor, num: int, width: int, rounds: int, state: int) -> tuple[Tensor, Tensor]:
    """Average the first keys, and find directions that carry most of their variance: see `principal_directions`.

    Args:
        k: keys, ``[lists, keys, head_dim]``.
        num: leading keys that are read.
        width: number of directions; 0 for the averages alone.
        rounds: products with the covariance.
        state: what the counters before those of the directions to begin with are hashed to.

    Returns:
        averages, ``[lists, 1, head_dim]``, and directions, ``[lists, head_dim, width]``, float32.
    """
    from hyperattention.kernels.choose import triton_key_basis

    results = _empty_basis(k, width)
    if k.shape[0] and k.shape[1]:
        triton_key_basis.launch_basis(k, results, num, rounds, state).run()
    return results


def _empty_basis(k: Tensor, width: int) -> tuple[Tensor, Tensor]:
    middle = k.new_empty((k.shape[0], 1, k.shape[2]), dtype=torch.float32)
    return middle, middle.new_empty((k.shape[0], k.shape[2], width))


@key_basis.register_fake
def _(k, num, width, *rest):
    return _empty_basis(k, width)


@torch.library.custom_op("hyperattention::represent", mutates_args=())
def represent(
    keys: Tensor, among: Tensor | None, size: int, means: int, far: int, moments: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Represent the keys of each block of a level: see `Representatives.choose`.

    Args:
        keys: keys in whole blocks, ``[lists, room, width]``, float32.
        among: keys of smaller blocks that may be chosen, ``[lists, smaller blocks, candidates, width]``; None for all.
        size: keys in a block.
        means: parts of a block that are averaged.
        far: single keys that are chosen.
        moments: whether the mean and the variance of all keys of a block are wanted.
        dtype: of the representatives and the moments.

    Returns:
        averages and keys, ``[lists, blocks, means + far, width]``; these keys alone, in float32; and means beside variances,
        ``[lists, blocks, 2 * width]``, empty if they are not wanted.
    """
    from hyperattention.kernels.choose import triton_represent

    results = _empty_represented(keys, size, means, far, moments, dtype)
    if results[0].numel():
        among = None if among is None else among.contiguous()
        triton_represent.launch_represent(keys.contiguous(), among, results, size, means).run()
    return results


def _empty_represented(
    keys: Tensor, size: int, means: int, far: int, moments: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shape, width = (keys.shape[0], keys.shape[1] // size), keys.shape[2]
    summary = keys.new_empty((*shape, means + far, width), dtype=dtype)
    return summary, keys.new_empty((*shape, far, width)), summary.new_empty((*shape, 2 * width) if moments else (0,))


@represent.register_fake
def _(keys, among, size, means, far, moments, dtype):
    return _empty_represented(keys, size, means, far, moments, dtype)


@torch.library.custom_op("hyperattention::open_blocks", mutates_args=())
def open_blocks(
    mass: Tensor, first: Tensor | None, edges: Tensor, size: int, keep: int, cut: int, nothing: int, child: int
) -> tuple[Tensor, Tensor]:
    """Open the blocks with the largest mass, and all blocks that an edge cuts: see `Walk`.

    Args:
        mass: estimated weight of each block, ``[lists, tiles, blocks]``.
        first: first key of each block; None for the leading ones.
        edges: edges of the remaining keys, ``[lists, tiles, 5]``.
        size: keys in a block.
        keep: blocks that are opened.
        cut: opened blocks, those cut by an edge first, that stand before all others.
        nothing: first key of what fills places if fewer blocks remain.
        child: keys in the parts of an opened block.

    Returns:
        which blocks are leaves, ``[lists, tiles, blocks]``, and the first keys of all parts of the opened ones,
        ``[lists, tiles, keep * size / child]``.
    """
    from hyperattention.kernels.choose import triton_open_blocks

    results = _empty_opened(mass, edges, keep * (size // child))
    if results[0].numel():
        triton_open_blocks.launch_open(mass, first, edges, results, size, keep, cut, nothing, child).run()
    return results


def _empty_opened(mass: Tensor, edges: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    return mass.new_empty(mass.shape, dtype=torch.uint8), edges.new_empty((*mass.shape[:2], parts))


@open_blocks.register_fake
def _(mass, first, edges, size, keep, cut, nothing, child):
    return _empty_opened(mass, edges, keep * (size // child))


@torch.library.custom_op("hyperattention::draw_leaves", mutates_args=("index", "weight"))
def draw_leaves(
    opened: Tensor | None,
    num_opened: int,
    first: list[Tensor],
    mass: list[Tensor],
    alive: list[Tensor],
    size: list[int],
    edges: Tensor,
    noise: Tensor,
    index: Tensor,
    weight: Tensor,
    uniform_share: float,
    clip_rounds: int,
    least: float,
    final: bool,
) -> None:
    """Draw keys from leaves: see `select.score.leaves`.

    Args:
        opened: keys of the blocks opened last, ``[lists, tiles, num_opened]``; None for all leading keys.
        num_opened: their number.
        first: for each level of closed blocks their first keys, ``[lists, tiles, blocks]``; empty for the leading blocks.
        mass: their estimated weights, ``[lists, tiles, blocks]``, float32.
        alive: which of them are leaves.
        size: keys in a block of each level.
        edges: edges of the remaining keys, ``[lists, tiles, 5]``.
        noise: where inside its slot the first of evenly spaced points lies, ``[lists, tiles]``, float64.
        index: for the keys, ``[lists, tiles, num]``; some lists of many tiles may follow one another.
        weight: for their log-weights, or for their probabilities in a single draw.
        uniform_share: share of the draws that is spread uniformly over closed blocks.
        clip_rounds: rounds of clipping.
        least: sums below this count as 0.
        final: whether log-weights are wanted, and all keys where no more are left than draws.
    """
    from hyperattention.kernels.choose import triton_draw_leaves

    if index.numel():
        closed = zip((x if x.numel() else None for x in first), mass, alive, strict=True)
        leaves = [(opened, edges, edges), *closed]
        triton_draw_leaves.launch_draw(
            leaves, [1, *size], num_opened, edges, noise, (index, weight), uniform_share, clip_rounds, least, final=final
        ).run()


for _operator in (uniform_of_counters, uniform_of_tiles, key_basis, represent, open_blocks, draw_leaves):
    refuse_vmap(_operator, "choosing keys")
