"""Approximate attention in Hugging Face transformers models, through their own registries: no class is patched.

Importing this module changes nothing; `register` adds one name to two registries, `use` switches a model over and back.
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

# transformers treats names that contain "flash", "sdpa", "flex_attention" or "/" as implementations of its own
NAME = "hyperattention"


def register() -> None:
    """Make ``attn_implementation="hyperattention"`` known to transformers, with its mask, without which padding is dropped.

    Calling it again changes nothing. Models selected by name, outside `use`, run the default method and count nothing.
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
    """Run a model's attention by a method inside a ``with`` block, and say what really ran.

    Exact, and counted by reason: single queries (decoding), dropout, logit soft-capping, sinks, position bias, windows
    shorter than the keys, dense 4-D masks, layers not listed, fewer keys than ``min_length``, or than pay with a plan.
    Packed batches run document by document. With gradient checkpointing call ``backward`` inside the block, for it calls
    attention again. Refused with a ValueError: a model whose attention cannot be switched, or does more around it than can
    be followed, an argument that attention is given and that is unknown here, and a number out of range. docs/models.md
    lists the families. A block in which every call was exact ends with a warning.

    Blocks on one model may be nested: calls follow the innermost. They must be left in the reverse order; a block that is
    left before one that was entered later ends with a RuntimeError, because its calls may have followed the other's method
    (two generators that take turns, for example). While a block is open, another thread's block on the same model is
    refused. The model ends as it began in every case.

    Args:
        model: a transformers model, or a module that holds one.
        method: what runs; None for the default method. A plan runs its own method in each layer and head, from its
            crossover on, never if it did not pay where it was calibrated, and is refused for another model than its own.
        layers: indices of the layers to approximate, others stay exact; None for all, or all of the plan's.
        min_length: fewest keys worth approximating.
        seed: of every random draw; the layer's index enters too.
        warn: whether a block in which every call was exact ends with a warning; False where exact attention is the aim.

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
        warnings.warn(f"no attention call was approximated: {counter.counts}{why}", UserWarning, stacklevel=3)


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
            f"{type(model).__name__} holds no transformers model: pass a PreTrainedModel, or a module that wraps one; "
            "for a module of your own call hyperattention.attention in its forward"
        )
    check_dispatch(root)
    return root


def _check_layers(model: nn.Module, layers: Iterable[int] | None) -> frozenset[int] | None:
    if layers is None:
        return None
    listed = frozenset(layers)
    known = {index for module in model.modules() if isinstance(index := module.__dict__.get("layer_idx"), int)}
    if unknown := sorted(listed - known):
        raise ValueError(f"layers {unknown} are not among the model's {sorted(known)}: list indices from those")
    return listed


def _check_range(name: str, number: int, limit: int | None) -> None:
    if number < 0 or (limit is not None and number >= limit):
        bound = "at least 0" if limit is None else f"in [0, {limit})"
        raise ValueError(f"{name} is {number}: pass an integer {bound}")
