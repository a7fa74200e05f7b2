"""Edges of tiles as a torch operator for GPUs: see `operator`."""

from dataclasses import astuple

import torch
from torch import Tensor

from hyperattention.kernels.choose.places import COLUMNS, EDGES, Places
from hyperattention.transforms import refuse_vmap


def place_tiles(places: Places, like: Tensor, rank: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute every number of a tile that depends only on its place, in one launch.

    Args:
        places: where the tiles lie, and which keys are taken by position.
        like: a tensor on the device of the result.
        rank: live keys at or before each position, ``[batch, keys]``; None if all are live.

    Returns:
        numbers of each tile, each of them contiguous, ``[10, lists, tiles]``: 0; end of the leading keys taken; live keys
        before the tile; those at or before its last position; live keys of all; first key of the window, the first
        that it may take, and its end; first key that it takes; end of the visible keys. Then edges of what is left, and the
        number of keys that all queries of the tile see, ``[lists, tiles, 5]``; log-weights of 0, ``[lists, tiles, 1]``;
        leading keys that each row may see, ``[lists, tiles, group * size]``; numbers of the tiles; numbers of the lists.
    """
    *numbers, causal, window = astuple(places)
    return _place_tiles(like, rank, numbers, causal, window)


@torch.library.custom_op("hyperattention::place_tiles", mutates_args=())
def _place_tiles(
    like: Tensor, rank: Tensor | None, numbers: list[int], causal: bool, window: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from hyperattention.kernels.choose import triton_place

    given, results = Places(*numbers, causal=causal, window=window), _empty(like, numbers)
    if results[2].numel():
        triton_place.launch_place(given, rank, results).run()
    return results


def _empty(like: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = Places(*numbers, causal=True, window=True)
    shape = given.batch * given.kv_heads, given.tiles
    table, edges, limit, index, key_row = (
        like.new_empty(x, dtype=torch.int64)
        for x in ((COLUMNS, *shape), (*shape, EDGES), (*shape, given.group * given.size), shape[1:], shape[:1])
    )
    return table, edges, like.new_empty((*shape, 1), dtype=torch.float32), limit, index, key_row


@_place_tiles.register_fake
def _(like, rank, numbers, causal, window):
    return _empty(like, numbers)


refuse_vmap(_place_tiles, "choosing keys")
