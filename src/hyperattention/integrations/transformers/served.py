"""The models and layers that support a compressed cache, found from the configuration before any text is read."""

import importlib
from types import MappingProxyType, ModuleType

from transformers import PreTrainedConfig

# models whose attention reads other tensors than those that their cache returns
_CHANGED = MappingProxyType(
    {
        "diffllama": "attends twice to the same keys, each time with half of the values",
        "jetmoe": "repeats keys and values for its experts after they were cached",
    }
)


def check_served(config: PreTrainedConfig) -> None:
    """Check that the model's attention reads the keys and values that its cache returns.

    Args:
        config: the configuration of the language model.

    Raises:
        ValueError: if the attention reads other tensors; the message gives the model and the reason.
    """
    reason = _CHANGED.get(config.model_type)
    if getattr(config, "kv_lora_rank", None) and _expands_latents(config):
        reason = "caches latents, and computes keys and values from them later"
    if reason is not None:
        raise ValueError(
            f"a compressed cache does not support {config.model_type}, which {reason}: the weights of the cache would not "
            "reach attention; use transformers' DynamicCache"
        )


def _expands_latents(config: PreTrainedConfig) -> bool:
    # older versions of transformers cached the keys and values themselves, which a compressed cache supports
    module = _modeling(config)
    return module is not None and any("expand_kv" in vars(each) for each in vars(module).values() if isinstance(each, type))


def _modeling(config: PreTrainedConfig) -> ModuleType | None:
    name = type(config).__module__
    try:
        return importlib.import_module(name.replace("configuration_", "modeling_"))
    except ImportError:
        return None


def cross_attention_layers(config: PreTrainedConfig) -> frozenset[int]:
    """List the layers that attend to images. Their keys are not text, and are read from the cache without an update.

    Args:
        config: the configuration of the language model.

    Returns:
        the numbers of these layers; an empty set for most models.
    """
    return frozenset(getattr(config, "cross_attention_layers", None) or ())


def count_readers(config: PreTrainedConfig, number: int) -> int:
    """Count the layers whose attention reads the keys of one layer: the layer itself, and later layers without own keys.

    Args:
        config: the configuration of the language model.
        number: the number of the layer, which must have keys.

    Returns:
        the number of layers.
    """
    kinds = list(getattr(config, "layer_types", None) or ())
    first_shared = len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)
    if number >= first_shared or kinds[number] in kinds[number + 1 : first_shared]:
        return 1
    return 1 + kinds[first_shared:].count(kinds[number])
