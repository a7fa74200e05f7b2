"""How long a text a model was made for, as its configuration says."""

from typing import Any

from transformers import PreTrainedConfig


def trained_length(config: PreTrainedConfig) -> int | None:
    """Read how many tokens a model's positions reach.

    Rotary positions that are stretched at use, such as YaRN's, may leave `max_position_embeddings` as it was in training:
    the factor then counts as well.

    Args:
        config: of the language model.

    Returns:
        tokens; None where the configuration names no length.
    """
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        return None
    given: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # some models have parameters for each kind of layer
    kinds = [each for each in given.values() if isinstance(each, dict)] or [given]
    reach = (
        (kind.get("factor") or 1.0) * (kind.get("original_max_position_embeddings") or length)
        for kind in kinds
        if kind.get("rope_type", kind.get("type", "default")) != "default"
    )
    return max(length, *(int(each) for each in reach), 0)
