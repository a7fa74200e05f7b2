"""The file of a compressed cache: read a document once, save its cache, and ask about the document later."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.policy import Policy
from hyperattention.cache.store import StoreFactory
from hyperattention.files.atomic_write import atomic_write_bytes
from hyperattention.files.fields import Field
from hyperattention.files.fingerprint import fingerprint
from hyperattention.files.outputs import refuse_existing
from hyperattention.files.plan_file import read_fingerprint
from hyperattention.files.policy_table import policy_from_json, policy_to_json
from hyperattention.integrations.transformers.cache import HyperCache
from hyperattention.integrations.transformers.cache_file_content import (
    FORMAT,
    REMEDY,
    VERSION,
    parsed,
    read_content,
    to_bytes,
)
from hyperattention.integrations.transformers.cache_keys import check_keys
from hyperattention.integrations.transformers.windowed_layer import rows_of
from hyperattention.random import SEED_LIMIT

__all__ = ["check_savable", "find_maker", "load_cache", "save_cache"]

_TOKENS, _MADE_BY = "tokens", "made by"


def save_cache(
    cache: HyperCache,
    model: PreTrainedModel,
    path: str | Path,
    *,
    tokens: Int[Tensor, "batch tokens"] | None = None,
    made_by: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a cache to one safetensors file, completely or not at all.

    Beside the tensors, the file holds the fingerprint of the model, the policy, and a SHA-256 checksum of its content.

    Cost: a copy of the cache in memory, and its bytes on disk.   Guarantee: a cache from `load_cache` continues bit for bit
    as this cache would, on the same device.

    Args:
        cache: the cache to save.
        model: the model that filled the cache.
        path: the file.
        tokens: the tokens that the model has read, to be saved with the cache; at least as many as the cache has seen.
        made_by: the folder or name that the model was loaded from, so that it can be loaded again.
        overwrite: whether an existing file may be replaced; if False, an existing file raises a FileExistsError.

    Raises:
        ValueError: if the cache is empty, a layer of the cache is neither compressed nor a sliding window, the policy is not
            one of this package, or the tokens do not match the cache.

    Example:
        >>> save_cache(cache, model, "document.safetensors", tokens=tokens)  # doctest: +SKIP
    """
    if not overwrite:
        refuse_existing(Path(path), "overwrite=True")
    check_savable(cache, model)
    stores = cache.stores
    if empty := [number for number, store in stores.items() if not store.batch]:
        raise ValueError(f"layers {empty} of the cache hold no keys: run the model on some tokens before you save the cache")
    tensors = {f"layer.{number}.{name}": x for number, state in cache.state().items() for name, x in state.items()}
    if tokens is not None:
        first = next(iter(stores.values()))
        if not _are_tokens_of(tokens, first.batch, first.seen):
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}: give all {first.seen} tokens of each of the {first.batch} rows "
                "that the cache has seen"
            )
        tensors[_TOKENS] = tokens.to(torch.int32)
    # copies, because safetensors refuses tensors that share memory
    tensors = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": json.dumps(asdict(fingerprint(model))),
        "cache": json.dumps({"policy": policy_to_json(cache.policy), "room": asdict(cache.room), "seed": cache.seed}),
    }
    if made_by is not None:
        metadata[_MADE_BY] = made_by
    atomic_write_bytes(Path(path), to_bytes(tensors, metadata))


def check_savable(cache: HyperCache, model: PreTrainedModel) -> None:
    """Check, before any text is read, that the file can hold every layer of a cache.

    Args:
        cache: the cache, which may be empty.
        model: the model that will fill the cache.

    Raises:
        ValueError: if the cache has a layer that is neither compressed nor a sliding window.
    """
    held = cache.stores.keys() | cache.windows.keys()
    if others := {number: type(layer).__name__ for number, layer in enumerate(cache.layers) if number not in held}:
        raise ValueError(
            f"layers {others} of {type(model).__name__} are of kinds that this file does not hold: use a model "
            "whose layers all have full attention or sliding windows"
        )


def load_cache(
    path: str | Path, model: PreTrainedModel, *, allow_longer: bool = False
) -> tuple[HyperCache, Int[Tensor, "batch tokens"] | None]:
    """Read a cache that the same model wrote. The complete file is checked first.

    Args:
        path: the file.
        model: the model that continues. The tensors of each layer move to the device of its keys in the first step.
        allow_longer: whether a text may exceed the model's trained length.

    Returns:
        the cache, and the tokens that were saved with it, or None.

    Raises:
        ValueError: if the file is not a complete cache of this version, or belongs to another model; the message gives the
            file and the remedy.
    """
    metadata, tensors = read_content(path)
    _check_made_by(path, metadata, model)
    made = _read_made(Field(parsed(path, metadata["cache"]), str(path), "", REMEDY))
    tokens = tensors.pop(_TOKENS, None)
    try:
        cache = HyperCache(model.config, policy=made.policy, seed=made.seed, allow_longer=allow_longer, **asdict(made.room))
        _fill(cache, tensors, model)
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}; {REMEDY}") from error
    first = next(iter(cache.stores.values()))
    if tokens is not None and not (tokens.dtype == torch.int32 and _are_tokens_of(tokens, first.batch, first.seen)):
        raise ValueError(f"{path}: the tokens of shape {tuple(tokens.shape)} do not match the cache; {REMEDY}")
    # parameters of an offloaded model are on the meta device, and its hooks accept inputs from any device
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    return cache, None if tokens is None else tokens.to(device, torch.int64)


def find_maker(path: str | Path) -> str | None:
    """Return the folder or name that the model of a cache was loaded from. The rest of the file is not checked.

    Args:
        path: the file.

    Returns:
        the `made_by` of `save_cache`; None if it was not given.

    Raises:
        ValueError: if the file is not a safetensors file.
    """
    try:
        with safe_open(str(path), "pt") as opened:
            return (opened.metadata() or {}).get(_MADE_BY)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path} as a cache: {error}; {REMEDY}") from error


@dataclass(frozen=True)
class _Made:
    """The arguments of a saved cache."""

    policy: Policy | StoreFactory
    room: CacheBudget
    seed: int


def _are_tokens_of(tokens: Tensor, batch: int, seen: int) -> bool:
    # there may be more tokens than seen, because the last generated token has not been read yet
    return tokens.ndim == 2 and tokens.shape[0] == batch and tokens.shape[1] >= seen


def _check_made_by(path: str | Path, metadata: Mapping[str, str], model: PreTrainedModel) -> None:
    there = read_fingerprint(Field(parsed(path, metadata["model"]), str(path), "model", REMEDY))
    if differences := there.differences(fingerprint(model)):
        raise ValueError(
            f"{path} was written by another model: {', '.join(differences)}; load the model that wrote the file, or read "
            "the document again with this model"
        )


def _read_made(whole: Field) -> _Made:
    given = whole.known("policy", "room", "seed")
    room = given["room"].known("budget", "sinks", "window")
    budget, sinks, window = (room[name].whole() for name in ("budget", "sinks", "window"))
    try:
        room = CacheBudget(budget, sinks, window)
    except ValueError as error:
        given["room"].refuse(str(error))
    return _Made(policy_from_json(given["policy"]), room, given["seed"].whole(0, SEED_LIMIT - 1))


def _fill(cache: HyperCache, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """Restore the state of every layer, and check that the states fit the model and each other."""
    states: dict[str, dict[str, Tensor]] = {str(number): {} for number in sorted({*cache.stores, *cache.windows})}
    for full_name, x in tensors.items():
        kind, _, rest = full_name.partition(".")
        number, _, name = rest.partition(".")
        if kind != "layer" or number not in states:
            raise ValueError(
                f"the tensor {full_name!r} belongs to no layer of the model: load it with the model that wrote it"
            )
        states[number][name] = x
    of_layers = {int(number): state for number, state in states.items()}
    check_keys(of_layers, model)
    cache.restore(of_layers)
    lengths = {(store.batch, store.seen) for store in cache.stores.values()}
    lengths |= {(rows_of(window), window.cumulative_length) for window in cache.windows.values()}
    if len(lengths) != 1:
        raise ValueError(
            f"the layers have read different numbers of rows and tokens, {sorted(lengths)}: read the text again"
        )
