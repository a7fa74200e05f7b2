"""Layers of transformers' own that keep a sliding window, as state and back."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from hyperattention.cache.fitting import fit_state, floating_type, insist


def window_of(layer: object) -> DynamicSlidingWindowLayer | None:
    """Return whether a layer is one that keeps a sliding window and nothing else.

    Args:
        layer: of a cache.

    Returns:
        the layer; None if it is of another kind.
    """
    return layer if type(layer) is DynamicSlidingWindowLayer else None


def window_state(layer: DynamicSlidingWindowLayer) -> dict[str, Tensor]:
    """Copy what the next token needs: the keys and values of the window, and how many tokens were read.

    Args:
        layer: which has read something.

    Returns:
        the state.

    Raises:
        ValueError: if it has read nothing.
    """
    if layer.keys is None or layer.values is None or not layer.is_initialized:
        raise ValueError("a layer with a sliding window holds nothing: let the model read something first")
    # a layer that may take tokens back holds more than the next token needs
    num = min(layer.cumulative_length, layer.sliding_window - 1)
    first = layer.keys.shape[2] - num
    k, v = (x[:, :, first:].clone(memory_format=torch.contiguous_format) for x in (layer.keys, layer.values))
    return {"k": k, "v": v, "numbers": torch.tensor([layer.cumulative_length], dtype=torch.int64, device="cpu")}


def restore_window(layer: DynamicSlidingWindowLayer, state: Mapping[str, Tensor]) -> None:
    """Go on from a state.

    Args:
        layer: as it was made.
        state: what `window_state` gave.
            A state that a layer with this window cannot be in is refused with a ValueError.
    """
    slot = "batch kv_heads slots"
    wanted = {"k": (f"{slot} head_dim", floating_type(state)), "v": (f"{slot} value_dim", floating_type(state, "v"))}
    size = fit_state(state, wanted | {"numbers": ("1", torch.int64)})
    seen, most = int(state["numbers"][0]), layer.sliding_window - 1
    insist(size["slots"] == min(seen, most), f"{size['slots']} tokens of {seen} are held by a window of {most + 1}")
    layer.lazy_initialization(state["k"], state["v"])
    layer.keys, layer.values, layer.cumulative_length = state["k"], state["v"], seen


def move_window(layer: DynamicSlidingWindowLayer, device: torch.device) -> None:
    """Move what is held to where attention runs.

    Args:
        layer: the layer.
        device: where.
    """
    if layer.keys is not None and layer.values is not None and layer.keys.device != device:
        layer.keys, layer.values, layer.device = layer.keys.to(device), layer.values.to(device), device


def rows_of(layer: DynamicSlidingWindowLayer) -> int:
    """Count the rows of the batch.

    Args:
        layer: the layer.

    Returns:
        their number; 0 while nothing is held.
    """
    return 0 if layer.keys is None else layer.keys.shape[0]
