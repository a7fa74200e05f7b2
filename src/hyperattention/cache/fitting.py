"""Checks that tensors fit a store: those of a state before it is restored, and new keys before they are written."""

from collections.abc import Mapping

import torch
from torch import Tensor


def fit_state(state: Mapping[str, Tensor], wanted: Mapping[str, tuple[str, torch.dtype]]) -> dict[str, int]:
    """Check that a state holds exactly the wanted tensors, with the wanted dtypes and axes that agree.

    Args:
        state: tensors by name.
        wanted: for each name its axes, as jaxtyping writes them, and its dtype; axes of equal name have equal size in all
            tensors, and a number is a size.

    Returns:
        the size of every named axis.

    Raises:
        ValueError: if a tensor is missing, unknown, or of another dtype or shape; the message names it.
    """
    missing, unknown = ([name for name in one if name not in other] for one, other in ((wanted, state), (state, wanted)))
    if missing or unknown:
        raise ValueError(
            f"the state of a layer lacks {missing} and holds unknown {unknown}: give the complete result of `state`"
        )
    sizes: dict[str, int] = {}
    for name, (axes, dtype) in wanted.items():
        x, names = state[name], axes.split()
        if x.dtype != dtype:
            raise ValueError(
                f"the state of a layer has {name} in {x.dtype}, which must be {dtype}: give the result of `state` unchanged"
            )
        if len(names) != x.ndim or any(
            size != (int(axis) if axis.isdecimal() else sizes.setdefault(axis, size))
            for axis, size in zip(names, x.shape, strict=False)
        ):
            shapes = {each: tuple(state[each].shape) for each in wanted}
            raise ValueError(f"the state of a layer has shapes {shapes}, which do not fit together: {name} must be [{axes}]")
    return sizes


def floating_type(state: Mapping[str, Tensor], name: str = "k") -> torch.dtype:
    """Return the dtype of a tensor of a state, by default of the keys, whose dtype other tensors must share.

    Args:
        state: tensors by name.
        name: name of the tensor.

    Returns:
        the dtype; float32 if there is no such tensor, which `fit_state` refuses.

    Raises:
        ValueError: if it is not a floating-point dtype.
    """
    dtype = state[name].dtype if name in state else torch.float32
    if not dtype.is_floating_point:
        raise ValueError(
            f"the state of a layer has {name} in {dtype}, which must be a floating-point type: give the result of "
            "`state` unchanged"
        )
    return dtype


def insist(holds: bool | Tensor, rule: str) -> None:
    """Check a rule about the numbers of a state.

    Args:
        holds: whether the rule holds.
        rule: the rule, for the error.

    Raises:
        ValueError: if the rule does not hold.
    """
    if not bool(holds):
        raise ValueError(
            f"the state of a layer is not one that a store can be in: {rule}; give the result of `state` unchanged"
        )


def fit_new(new: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> None:
    """Check that new keys and values match the stored ones, so that no tensor is cast or broadcast.

    Args:
        new: keys and values to be written.
        held: keys and values in the store.

    Raises:
        ValueError: if batch rows, heads, widths or dtypes differ.
    """
    ours, theirs = ([(*x.shape[:2], x.shape[3], x.dtype) for x in pair] for pair in (held, new))
    if ours != theirs:
        raise ValueError(
            f"the cache holds keys and values of (rows, kv heads, width, type) {ours} and is given {theirs}: use one cache "
            "for one model, in one precision, and reorder its rows when the batch changes"
        )
