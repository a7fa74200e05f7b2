"""Whether keys and values of a file are those that a model makes, as far as its configuration tells."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def check_keys(states: Mapping[int, Mapping[str, Tensor]], model: PreTrainedModel) -> None:
    """Refuse keys that the model could not have made: another number of kv heads, another width, another precision.

    Args:
        states: of every layer that has one, by its number; one without keys is left to its store, which refuses it.
        model: who is to go on from them.

    Raises:
        ValueError: naming the first layer that does not fit.
    """
    heads, width, dtypes = _kv_heads(model), _width(model), _dtypes(model)
    for number, state in states.items():
        for name in ("k", "v"):
            if name not in state or state[name].ndim != 4:
                continue
            x = state[name]
            if (heads or x.shape[1], width or x.shape[3]) != (x.shape[1], x.shape[3]):
                raise ValueError(
                    f"layer {number} has {name} of {x.shape[1]} kv heads of width {x.shape[3]}, and the model has "
                    f"{heads or 'any number'} of width {width or 'any'}"
                )
            if x.dtype not in dtypes:
                raise ValueError(
                    f"layer {number} has {name} in {x.dtype}, and the model computes in {', '.join(map(str, dtypes))}: load "
                    "the model in the precision that it read the document in"
                )


def _kv_heads(model: PreTrainedModel) -> int | None:
    return _count(model, "num_key_value_heads")


def _width(model: PreTrainedModel) -> int | None:
    # keys of latent attention, as DeepSeek's, are made of parts with widths of their own
    if _count(model, "kv_lora_rank"):
        return None
    heads, hidden = _count(model, "num_attention_heads"), _count(model, "hidden_size")
    return _count(model, "head_dim") or (hidden // heads if heads and hidden else None)


def _count(model: PreTrainedModel, name: str) -> int | None:
    config: Any = model.config
    value = getattr(config.get_text_config(decoder=True), name, None)
    return value if isinstance(value, int) else None


def _dtypes(model: PreTrainedModel) -> list[torch.dtype]:
    """List what the model may compute keys in: the types of its weights, and that of autocast inside it."""
    dtypes = dict.fromkeys(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    kind = model.device.type
    if torch.is_autocast_enabled(kind):
        dtypes[torch.get_autocast_dtype(kind)] = None
    return list(dtypes)
