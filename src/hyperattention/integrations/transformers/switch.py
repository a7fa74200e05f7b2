"""Approximate attention in Hugging Face transformers models, through the registries of transformers: no class is patched.

Importing this module changes nothing. `register` adds one name to two registries; `use` switches a model and restores it.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hyperattention.files.plan import Plan
from hyperattention.integrations.transformers.blocks import open_block
from hyperattention.integrations.transformers.cache import HyperCache
from hyperattention.integrations.transformers.counts import CallCounter, CallCounts
from hyperattention.integrations.transformers.dispatch import check_dispatch
from hyperattention.integrations.transformers.forward import ForwardSettings, attention_forward
from hyperattention.integrations.transformers.masks import build_mask
from hyperattention.methods.base import AttentionMethod
from hyperattention.random import SEED_LIMIT

__all__ = ["NAME", "CallCounter", "CallCounts", "HyperCache", "register", "use"]

# transformers treats names that contain "flash", "sdpa", "flex_attention" or "/" as its own implementations
NAME = "hyperattention"


def register() -> None:
    """Register ``attn_implementation="hyperattention"`` in transformers, with its mask function.

    The mask function is necessary: without it, transformers would not pass padding to attention. A second call changes
    nothing. A model that selects the attention by name, outside `use`, runs the default method, and its calls are not
    counted.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, build_mask)


@contextmanager
def use(
    model: nn.Module,
    method: AttentionMethod | Plan | None = None,
    *,
    layers: Iterable[int] | None = None,
    min_length: int = 0,
    seed: int = 0,
    warn: bool = True,
) -> Iterator[CallCounter]:
    """Run a model's attention with a method inside a ``with`` block, and count approximated and exact calls.

    These calls run exactly and are counted by reason: single queries (decoding), dropout, logit soft-capping, learned
    sinks, position bias, windows shorter than the keys, dense 4-D masks, layers that are not listed, and calls with fewer
    keys than ``min_length`` or than a plan's crossover. Packed batches run document by document. With gradient
    checkpointing, call ``backward`` inside the block, because ``backward`` calls attention again. These raise a
    ValueError: a model whose attention cannot be switched, an unknown argument of attention, and a number out of range.
    docs/models.md lists the model families. A block in which every call was exact ends with a warning.

    Blocks on one model may be nested: calls follow the innermost block. Blocks must close in the reverse order. A block
    that closes before a block that opened later raises a RuntimeError, because its calls may have used the other block's
    method (for example in two generators that alternate). While a block is open, a block of another thread on the same
    model is refused. The model is restored in every case.

    Args:
        model: a transformers model, or a module that contains one.
        method: the method to run; None for the default method. A plan runs its own method in each layer and head, from its
            crossover on. A plan without a crossover (not faster where it was calibrated) runs exact attention, and a plan
            for another model is refused.
        layers: indices of the layers to approximate; other layers run exactly. None for all layers, or all of the plan's.
        min_length: smallest number of keys that is approximated.
        seed: seed of every random draw; the draws also depend on the layer's index.
        warn: whether a block in which every call was exact ends with a warning; use False if you want exact attention.

    Yields:
        the counter of this block's calls; print it, or read ``.counts``.

    Example:
        >>> with use(model, method, layers=range(2, 28)) as calls:  # doctest: +SKIP
        ...     model.generate(**inputs)
        >>> print(calls)  # doctest: +SKIP
    """
    counter = CallCounter()
    root = _find_model(model)
    settings = _settings(root, method, _check_layers(model, layers), min_length, seed, counter)
    _check_range("min_length", min_length, None)
    _check_range("seed", seed, SEED_LIMIT)
    register()
    with open_block(model, root, settings, NAME):
        yield counter
    if warn and counter.counts.total and not counter.counts.approximated:
        why = f". {method.payoff()}" if isinstance(method, Plan) and method.crossover is None else ""
        warnings.warn(
            f"no attention call was approximated: {counter.counts}; give warn=False if that is meant{why}",
            UserWarning,
            stacklevel=3,
        )


def _settings(
    root: PreTrainedModel,
    method: AttentionMethod | Plan | None,
    layers: frozenset[int] | None,
    min_length: int,
    seed: int,
    counter: CallCounter,
) -> ForwardSettings:
    if not isinstance(method, Plan):
        return ForwardSettings(method, layers, min_length, seed, counter)
    method.check(root)
    planned = frozenset(method.layers)
    listed = planned if layers is None else planned & layers
    return ForwardSettings(method.method, listed, min_length, seed, counter, method.crossover)


def _find_model(model: nn.Module) -> PreTrainedModel:
    root = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if root is None:
        raise ValueError(
            f"{type(model).__name__} holds no transformers model: pass a PreTrainedModel, or a module that contains one; "
            "in your own module, call hyperattention.attention in its forward"
        )
    check_dispatch(root)
    return root


def _check_layers(model: nn.Module, layers: Iterable[int] | None) -> frozenset[int] | None:
    if layers is None:
        return None
    listed = frozenset(layers)
    known = {index for module in model.modules() if isinstance(index := module.__dict__.get("layer_idx"), int)}
    if unknown := sorted(listed - known):
        raise ValueError(f"layers {unknown} are not layers of the model: give indices from {sorted(known)}")
    return listed


def _check_range(name: str, number: int, limit: int | None) -> None:
    if number < 0 or (limit is not None and number >= limit):
        bound = "at least 0" if limit is None else f"in [0, {limit})"
        raise ValueError(f"{name} is {number}: pass an integer {bound}")
