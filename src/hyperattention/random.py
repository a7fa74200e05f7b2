"""The counter-based hash behind every draw: randomness as a pure function of integers.

No generator and no global state: the same counters give the same bits on every device, inside a captured graph and in the
recomputation of a checkpointed block. Counters are (seed, layer, kv head, tile, slot); none of them is the length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
SEED_LIMIT = 2**63


def _mix(x):
    # lowbias32 (Wellons, 2018, hash-prospector): products wrap in int64, whose low 32 bits are those of the true product
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def hash_bits(counters: Sequence[int | Tensor], device: torch.device | str) -> Tensor:
    """Hash integer counters, broadcast against one another, to 32 uniform bits each.

    Args:
        counters: non-negative integers or int64 tensors below 2**63, most significant first (seed, layer, head, tile, slot).
        device: device of the bits; counters that are tensors must be on this device.

    Returns:
        int64 values in [0, 2**32), of the counters' broadcast shape.
    """
    state = hash_state(counters)
    return state if isinstance(state, Tensor) else torch.full((), state, dtype=torch.int64, device=device)


def hash_state(counters: Sequence[int | Tensor]) -> int | Tensor:
    """Hash integer counters as `hash_bits` does, plain integers to a plain integer: what further counters are mixed into.

    Args:
        counters: as for `hash_bits`.

    Returns:
        32 bits.
    """
    state = 0x9E3779B9
    for counter in counters:  # plain integers, which come first, are mixed before there is any tensor
        # both halves of each counter are mixed in; the odd constant lets a zero counter change the state too
        state = _mix(((state ^ (counter & _MASK)) + 0x85EBCA6B) & _MASK)
        state = _mix(((state ^ (counter >> 32)) + 0xC2B2AE35) & _MASK)
    return state


def uniform(counters: Sequence[int | Tensor], device: torch.device | str) -> Tensor:
    """Hash integer counters to float64 values in [0, 1), exact multiples of 2**-32.

    Args:
        counters: as for `hash_bits`.
        device: device of the values.

    Returns:
        float64 values of the counters' broadcast shape.
    """
    return hash_bits(counters, device).double() * 2.0**-32


def normal(counters: Sequence[int | Tensor], device: torch.device | str) -> Tensor:
    """Hash integer counters to standard normal float64 values, by the inverse of the normal distribution function.

    Args:
        counters: as for `hash_bits`.
        device: device of the values.

    Returns:
        float64 values of the counters' broadcast shape, all finite.
    """
    bits = hash_bits(counters, device).double()
    return torch.special.ndtri((bits + 0.5) * 2.0**-32)
