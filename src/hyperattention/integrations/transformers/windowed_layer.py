"""Sliding-window cache layers of transformers: save their state and restore it."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from hyperattention.cache.fitting import fit_state, floating_type, insist


def window_of(layer: object) -> DynamicSlidingWindowLayer | None:
    """Return the layer if it is a sliding-window layer of transformers.

    Args:
        layer: a layer of a cache.

    Returns:
        the same layer; None for any other class, subclasses included.
    """
    return layer if type(layer) is DynamicSlidingWindowLayer else None


def window_state(layer: DynamicSlidingWindowLayer) -> dict[str, Tensor]:
    """Copy the state that the next token needs: keys and values of the window, and the number of tokens read.

    Args:
        layer: a layer that has read at least one token.

    Returns:
        the state: tensors `k`, `v` and `numbers`.

    Raises:
        ValueError: if the layer has read no token.
    """
    if layer.keys is None or layer.values is None or not layer.is_initialized:
        raise ValueError("a layer with a sliding window holds no keys: run the model on some tokens first")
    # a layer that supports the removal of tokens holds more keys than the next token needs
    num = min(layer.cumulative_length, layer.sliding_window - 1)
    first = layer.keys.shape[2] - num
    k, v = (x[:, :, first:].clone(memory_format=torch.contiguous_format) for x in (layer.keys, layer.values))
    return {"k": k, "v": v, "numbers": torch.tensor([layer.cumulative_length], dtype=torch.int64, device="cpu")}


def restore_window(layer: DynamicSlidingWindowLayer, state: Mapping[str, Tensor]) -> None:
    """Restore a state that `window_state` returned.

    Args:
        layer: a new layer.
        state: the result of `window_state`.
            A state that is impossible for a layer with this window raises a ValueError.
    """
    slot = "batch kv_heads slots"
    wanted = {"k": (f"{slot} head_dim", floating_type(state)), "v": (f"{slot} value_dim", floating_type(state, "v"))}
    size = fit_state(state, wanted | {"numbers": ("1", torch.int64)})
    seen, most = int(state["numbers"][0]), layer.sliding_window - 1
    insist(size["slots"] == min(seen, most), f"{size['slots']} tokens of {seen} are held by a window of {most + 1}")
    layer.lazy_initialization(state["k"], state["v"])
    layer.keys, layer.values, layer.cumulative_length = state["k"], state["v"], seen


def move_window(layer: DynamicSlidingWindowLayer, device: torch.device) -> None:
    """Move the keys and values of a layer to the device of attention.

    Args:
        layer: the layer.
        device: the target device.
    """
    if layer.keys is not None and layer.values is not None and layer.keys.device != device:
        layer.keys, layer.values, layer.device = layer.keys.to(device), layer.values.to(device), device


def rows_of(layer: DynamicSlidingWindowLayer) -> int:
    """Return the batch size of a layer.

    Args:
        layer: the layer.

    Returns:
        the number of rows of the batch; 0 while the layer is empty.
    """
    return 0 if layer.keys is None else layer.keys.shape[0]
