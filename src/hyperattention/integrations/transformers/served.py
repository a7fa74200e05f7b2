"""Which layers of a model a compressed cache can serve, as its configuration says, before anything is read."""

import importlib
from types import MappingProxyType, ModuleType

from transformers import PreTrainedConfig

# models whose attention reads something else than what their cache hands out
_CHANGED = MappingProxyType(
    {
        "diffllama": "attends twice to one set of keys, with half of the values each",
        "jetmoe": "repeats keys and values for its experts after they were cached",
    }
)


def check_served(config: PreTrainedConfig) -> None:
    """Refuse a model whose attention does not read the keys and values that its cache hands out.

    Args:
        config: of the language model.

    Raises:
        ValueError: naming the model and why.
    """
    reason = _CHANGED.get(config.model_type)
    if getattr(config, "kv_lora_rank", None) and _expands_latents(config):
        reason = "caches latents, and makes keys and values of them after"
    if reason is not None:
        raise ValueError(
            f"a compressed cache cannot serve {config.model_type}, which {reason}, so that weights are lost on the way: use "
            "transformers' DynamicCache"
        )


def _expands_latents(config: PreTrainedConfig) -> bool:
    # older versions cached the keys and values themselves, which can be served
    module = _modeling(config)
    return module is not None and any("expand_kv" in vars(each) for each in vars(module).values() if isinstance(each, type))


def _modeling(config: PreTrainedConfig) -> ModuleType | None:
    name = type(config).__module__
    try:
        return importlib.import_module(name.replace("configuration_", "modeling_"))
    except ImportError:
        return None


def cross_attention_layers(config: PreTrainedConfig) -> frozenset[int]:
    """List the layers that attend to images, whose keys are no text and are read from the cache without being updated.

    Args:
        config: of the language model.

    Returns:
        their numbers; none for most models.
    """
    return frozenset(getattr(config, "cross_attention_layers", None) or ())


def count_readers(config: PreTrainedConfig, number: int) -> int:
    """Count the layers whose attention reads the keys of one layer: itself, and later ones that have none of their own.

    Args:
        config: of the language model.
        number: the layer, which has keys.

    Returns:
        how many.
    """
    kinds = list(getattr(config, "layer_types", None) or ())
    first_shared = len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)
    if number >= first_shared or kinds[number] in kinds[number + 1 : first_shared]:
        return 1
    return 1 + kinds[first_shared:].count(kinds[number])
