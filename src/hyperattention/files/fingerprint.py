"""The fingerprint of the model that a plan was made for: its shape, and a hash over a few of its weights."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

# values of each weight that enter the hash
_VALUES = 64


@dataclass(frozen=True)
class Fingerprint:
    """The properties that distinguish one model from another.

    Args:
        model_class: name of the model's class.
        num_layers: number of attention layers.
        num_heads: query heads of a layer; 0 if the configuration does not give one number.
        num_kv_heads: kv heads of a layer; 0 likewise.
        head_dim: width of a head; 0 likewise.
        weights: SHA-256 over the names and shapes of all weights, and a few values of each.
    """

    model_class: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    weights: str

    def differences(self, other: "Fingerprint") -> list[str]:
        """Describe how another model differs.

        Args:
            other: fingerprint of the other model.

        Returns:
            one phrase per difference; if shapes differ, only the shapes, because then the weights differ too.
        """
        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]
        shapes = [name for name in names if name != "weights"]
        return [
            f"{name.replace('_', ' ')} {getattr(self, name)} there and {getattr(other, name)} here" for name in shapes
        ] or (["other weights in the same shape"] if names else [])


def fingerprint(model: nn.Module) -> Fingerprint:
    """Compute the fingerprint of a transformers model.

    Values are rounded to bfloat16 before they are hashed, so that the fingerprint does not depend on the precision in which
    the model is loaded. The weights of a model that accelerate has offloaded are fetched one module at a time. A weight
    without values, as on the meta device, is refused with a ValueError.

    Args:
        model: the model, without wrappers.

    Returns:
        the fingerprint.
    """
    whole: Any = model.config
    shape = shape_of(whole.get_text_config())
    return Fingerprint(type(model).__name__, *shape, hash_weights(_loaded_weights(model)))


def shape_of(config: object) -> tuple[int, int, int, int]:
    """Read the shape of a language model from its configuration.

    Args:
        config: the configuration.

    Returns:
        layers, query heads, kv heads and width of a head, each 0 if the configuration does not give one number.
    """
    heads = _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads") or heads
    head_dim = _count(config, "head_dim") or (_count(config, "hidden_size") // heads if heads else 0)
    return _count(config, "num_hidden_layers"), heads, kv_heads, head_dim


def _count(config: object, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def hash_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Compute the hash over the weights of a model.

    Args:
        weights: every weight with its name, sorted by name.

    Returns:
        SHA-256 over names, shapes and a few values of each.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        if not weight.numel():
            continue
        flat = weight.detach().flatten()
        # evenly spaced, the first and the last among them
        index = torch.linspace(0, flat.numel() - 1, min(_VALUES, flat.numel()), dtype=torch.float64, device="cpu").long()
        values = flat[index.to(flat.device)]
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.int16)
        digest.update(str(values.tolist()).encode())
    return digest.hexdigest()


def _loaded_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give every weight with its values, one at a time."""
    for name, module in sorted(_owners(model).items()):
        with _loaded(module, name) as weight:
            yield name, weight


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """Find the module of every weight, by the weight's name; one that several modules share is named once."""
    named = dict(model.named_parameters())
    # offloading gives every module a place of its own for a weight that they share
    offloaded = any(weight.is_meta for weight in named.values())
    tied: dict[str, str] = (getattr(model, "all_tied_weights_keys", None) or {}) if offloaded else {}
    first: dict[str, str] = {}
    for name in named:
        first.setdefault(tied.get(name, name), name)
    return {name: model.get_submodule(name.rpartition(".")[0]) for name in first.values()}


@contextmanager
def _loaded(module: nn.Module, name: str) -> Iterator[Tensor]:
    """Give a weight with its values: accelerate fetches what it has offloaded, and they are let go of again."""
    own = name.rpartition(".")[2]
    if not module.get_parameter(own).is_meta:
        yield module.get_parameter(own)
        return
    accelerate = None if find_spec("accelerate") is None else import_module("accelerate.utils")
    if accelerate is None or not accelerate.has_offloaded_params(module):
        raise ValueError(
            f"the weight {name} has no values to tell this model by: it is on the meta device, and accelerate has not "
            "offloaded it; load the model with its weights"
        )
    with accelerate.align_module_device(module, "cpu"):
        yield module.get_parameter(own)
