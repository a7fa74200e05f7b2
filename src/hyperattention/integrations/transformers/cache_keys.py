"""Checks that keys and values of a file fit a model, as far as its configuration gives their sizes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def check_keys(states: Mapping[int, Mapping[str, Tensor]], model: PreTrainedModel) -> None:
    """Check that the model can have computed some keys: their number of kv heads, their width and their dtype.

    Args:
        states: the state of every stored layer, by layer number; a state without keys is checked by its store.
        model: the model that continues from the states.

    Raises:
        ValueError: for the first layer that does not fit the model.
    """
    heads, width, dtypes = _sizes(model, "key_value_heads"), _widths(model), _dtypes(model)
    for number, state in states.items():
        for name in ("k", "v"):
            if name not in state or state[name].ndim != 4:
                continue
            x = state[name]
            if x.shape[1] not in (heads or (x.shape[1],)) or x.shape[3] not in (width or (x.shape[3],)):
                raise ValueError(
                    f"layer {number} has {name} of {x.shape[1]} kv heads of width {x.shape[3]}, but the model has "
                    f"{_either(heads) or 'any number'} of width {_either(width) or 'any'}: load the model that wrote it"
                )
            if x.dtype not in dtypes:
                raise ValueError(
                    f"layer {number} has {name} in {x.dtype}, but the model computes in {', '.join(map(str, dtypes))}: load "
                    "the model in the dtype in which it read the document"
                )


def _either(sizes: tuple[int, ...]) -> str:
    return " or ".join(map(str, sizes))


def _widths(model: PreTrainedModel) -> tuple[int, ...]:
    # keys of latent attention, as in DeepSeek's models, consist of parts with different widths
    if _sizes(model, "kv_lora_rank"):
        return ()
    config: Any = model.config.get_text_config(decoder=True)
    named, own = _sizes(model, "head_dim"), getattr(config, "head_dim", None)
    heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if own is None and isinstance(heads, int) and isinstance(hidden, int):
        return (*named, hidden // heads)
    return named


# In some models values have another width than keys, or windowed layers have other heads. The result lists every size that
# some layer may have. If the configuration gives one size for each layer, or none, the result is empty: any size is allowed.
def _sizes(model: PreTrainedModel, name: str) -> tuple[int, ...]:
    """List the values of all configuration entries whose name ends with `name`."""
    config: Any = model.config
    given = {key: size for key, size in vars(config.get_text_config(decoder=True)).items() if key.endswith(name)}
    sizes = tuple(dict.fromkeys(size for size in given.values() if size is not None))
    return sizes if all(isinstance(size, int) for size in sizes) else ()


def _dtypes(model: PreTrainedModel) -> list[torch.dtype]:
    """List the dtypes in which the model may compute keys: those of its weights, and those of autocast for float32."""
    # it is not known here whether autocast was or will be on; the first step refuses keys of a different dtype
    dtypes = dict.fromkeys(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    return list(dtypes | (dict.fromkeys((torch.bfloat16, torch.float16)) if torch.float32 in dtypes else {}))
