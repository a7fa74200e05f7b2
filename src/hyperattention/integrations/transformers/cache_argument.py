"""The name of a model's cache argument: `cache` from transformers 5.24 on, `past_key_values` before."""

import inspect
from functools import cache as remembered

from transformers import PreTrainedModel


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the argument through which a model, and its `generate`, take a cache.

    Args:
        model: the model.

    Returns:
        the name of the argument.
    """
    return _argument_of(type(model))


@remembered
def _argument_of(kind: type[PreTrainedModel]) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"
