"""Whether keys and values of a file are those that a model makes, as far as its configuration says."""

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
    heads, width, dtypes = _sizes(model, "key_value_heads"), _widths(model), _dtypes(model)
    for number, state in states.items():
        for name in ("k", "v"):
            if name not in state or state[name].ndim != 4:
                continue
            x = state[name]
            if x.shape[1] not in (heads or (x.shape[1],)) or x.shape[3] not in (width or (x.shape[3],)):
                raise ValueError(
                    f"layer {number} has {name} of {x.shape[1]} kv heads of width {x.shape[3]}, and the model has "
                    f"{_either(heads) or 'any number'} of width {_either(width) or 'any'}"
                )
            if x.dtype not in dtypes:
                raise ValueError(
                    f"layer {number} has {name} in {x.dtype}, and the model computes in {', '.join(map(str, dtypes))}: load "
                    "the model in the precision that it read the document in"
                )


def _either(sizes: tuple[int, ...]) -> str:
    return " or ".join(map(str, sizes))


def _widths(model: PreTrainedModel) -> tuple[int, ...]:
    # keys of latent attention, as DeepSeek's, are made of parts with widths of their own
    if _sizes(model, "kv_lora_rank"):
        return ()
    config: Any = model.config.get_text_config(decoder=True)
    named, own = _sizes(model, "head_dim"), getattr(config, "head_dim", None)
    heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if own is None and isinstance(heads, int) and isinstance(hidden, int):
        return (*named, hidden // heads)
    return named


# Some models give values another width than keys, or layers with windows other heads: all sizes are listed that some layer
# may have. Where a size is a list, one for each layer, or is not named, none is listed, and any is allowed.
def _sizes(model: PreTrainedModel, name: str) -> tuple[int, ...]:
    """List what the configuration says of a size, under its name or a longer one that ends with it."""
    config: Any = model.config
    given = {key: size for key, size in vars(config.get_text_config(decoder=True)).items() if key.endswith(name)}
    sizes = tuple(dict.fromkeys(size for size in given.values() if size is not None))
    return sizes if all(isinstance(size, int) for size in sizes) else ()


def _dtypes(model: PreTrainedModel) -> list[torch.dtype]:
    """List what the model may compute keys in: the types of its weights, and those of autocast where it casts these."""
    # whether autocast was on when the keys were made, and will be when they are read, is not known here: the first step
    # refuses keys of another type than it makes
    dtypes = dict.fromkeys(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    return list(dtypes | (dict.fromkeys((torch.bfloat16, torch.float16)) if torch.float32 in dtypes else {}))
