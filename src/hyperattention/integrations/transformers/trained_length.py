"""The largest text length that a model was made for, read from its configuration."""

from typing import Any

from transformers import PreTrainedConfig


def trained_length(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that a model's positions support.

    For scaled rotary positions, such as YaRN, `max_position_embeddings` may still be the length of training; the result
    then includes the scaling factor.

    Args:
        config: the configuration of the language model.

    Returns:
        the number of tokens; None if the configuration gives no length.
    """
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        return None
    given: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # some models have separate parameters for each kind of layer
    kinds = [each for each in given.values() if isinstance(each, dict)] or [given]
    reach = (
        (kind.get("factor") or 1.0) * (kind.get("original_max_position_embeddings") or length)
        for kind in kinds
        if kind.get("rope_type", kind.get("type", "default")) != "default"
    )
    return max(length, *(int(each) for each in reach), 0)
