"""The method of each layer of the served model: a preset, a method or a plan, checked against the model."""

import math
from dataclasses import dataclass

import torch

from hyperattention.files.plan import Plan
from hyperattention.files.plan_file import load_plan
from hyperattention.integrations.vllm.options import Options
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.by_layer import ByLayer
from hyperattention.methods.default import (
    CROSSOVER,
    GPU_CROSSOVER,
    LEAN_CROSSOVER,
    THOROUGH_CROSSOVER,
    default_method,
    lean_method,
    thorough_method,
)
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.select.stage import LookAhead


@dataclass(frozen=True)
class Choice:
    """What runs in each layer.

    Args:
        method: the method of every layer.
        layers: the layers that may be approximated; None for all.
        min_length: position from which on queries of a prompt are approximated, a multiple of `tile`; None for never.
        tile: positions at whose multiples a prompt can be cut without an effect on the choice of keys.
    """

    method: AttentionMethod
    layers: frozenset[int] | None
    min_length: int | None
    tile: int

    def of(self, layer: int, heads: tuple[int, int]) -> AttentionMethod | None:
        """Return the method of a layer, for the kv heads of this process.

        Args:
            layer: index of the layer.
            heads: first and end of the kv heads.

        Returns:
            the method; None if the layer is exact.
        """
        if self.min_length is None or (self.layers is not None and layer not in self.layers):
            return None
        method = self.method.of(layer) if isinstance(self.method, ByLayer) else self.method
        if isinstance(method, ByHead):
            method = ByHead(method.methods[heads[0] : heads[1]])
            if all(isinstance(each, Exact) for each in method.methods):
                return None
        return None if isinstance(method, Exact) else method


def choose(options: Options, plan: Plan | None, *, max_length: int, device: torch.device) -> Choice:
    """Decide what runs in each layer.

    Args:
        options: the options of the server.
        plan: the plan that they name, if any.
        max_length: the longest sequence that is served.
        device: device of the model.

    Returns:
        the choice.

    Raises:
        ValueError: if the method depends on how the engine cuts a prompt.
    """
    method, crossover = _method(options, plan, max_length, device)
    if method.looks_ahead == LookAhead.SEQUENCE:
        raise ValueError(
            f"{method!r} chooses keys by all queries of a prompt, which vLLM computes in chunks: use a preset, or a method "
            "that reads one tile at a time"
        )
    tile = math.lcm(*_tiles(method))
    layers = options.layers
    if plan is not None:
        planned = frozenset(plan.layers)
        if layers is not None and (unknown := sorted(layers - planned)):
            raise ValueError(f"layers {unknown} are not in the plan: list some of {sorted(planned)}, or leave `layers` out")
        layers = planned if layers is None else layers
    # a prompt of the length where a method breaks even sees half as many keys a query, on average
    least = options.min_length
    if least is None and crossover is not None:
        least = crossover // 2
    if isinstance(method, Exact):
        least = None
    return Choice(method, layers, None if least is None else -(-least // tile) * tile, tile)


def unreached(choice: Choice, options: Options, max_length: int) -> str | None:
    """Say what no request is long enough for.

    Args:
        choice: what runs in each layer.
        options: the options of the server.
        max_length: the longest sequence that is served.

    Returns:
        the text; None if some request can be approximated in every way that was asked for.
    """
    found = []
    if choice.min_length is not None and choice.min_length >= max_length:
        found.append(f"no prompt is approximated, because the method begins at position {choice.min_length}")
    if options.decode is not None and options.decode.least > max_length:
        found.append(f"no request decodes by its best pages, because these begin at {options.decode.least} keys")
    if not found:
        return None
    return (
        f"{'; '.join(found)}; requests end at {max_length} tokens: raise --max-model-len, or give a smaller `min_length` if "
        "it pays for your model"
    )


def read_plan(options: Options) -> Plan | None:
    """Read the plan that the options name.

    Args:
        options: the options.

    Returns:
        the plan; None without one.
    """
    return None if options.plan is None else load_plan(options.plan)


def _method(
    options: Options, plan: Plan | None, max_length: int, device: torch.device
) -> tuple[AttentionMethod, int | None]:
    """Return the method, and the length from which on it is faster; None if it never is."""
    if plan is not None:
        return plan.method, plan.crossover
    if isinstance(options.method, AttentionMethod):
        return options.method, 0
    # the list of stages does not depend on the length of a prompt: its chunks have to agree
    long = max(max_length, GPU_CROSSOVER)
    presets = {
        "default": (default_method, CROSSOVER),
        "thorough": (thorough_method, THOROUGH_CROSSOVER),
        "lean": (lean_method, LEAN_CROSSOVER),
    }
    preset, crossover = presets[options.method]
    return preset(long, device=device), GPU_CROSSOVER if device.type == "cuda" else crossover


def _tiles(method: AttentionMethod) -> list[int]:
    """List the tile sizes of all lists of stages in a method."""
    if isinstance(method, ByLayer):
        return [size for each in method.methods.values() for size in _tiles(each)]
    if isinstance(method, ByHead):
        return [size for each in method.methods for size in _tiles(each)]
    return [method.tile] if isinstance(method, Method) else [1]
