"""Sensitivities for any power p >= 1, bounded by Lewis weights: the change of density that turns l_p into l_2."""

import math

from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.check import positive
from hyperattention.sensitivity.gram import squared_norms, whitened
from hyperattention.sensitivity.key_rows import KeyRows, key_rows

# weights are positive; a key of this weight is one of zeros, or next to it
_LEAST = 1e-30


def lewis_weights(
    k: Float[Tensor, "lists keys head_dim"],
    total: Int[Tensor, "lists 1"] | None = None,
    *,
    power: float | int,
    rounds: int = 20,
) -> Float[Tensor, "lists keys"]:
    """Approximate the l_p Lewis weights of the keys: w_j = (k_j' (K' W^{1 - 2/p} K)^-1 k_j)^{p/2}, which add up to the rank.

    p < 4:   w <- (k_j' (K' W^{1 - 2/p} K)^-1 k_j)^{p/2}, whose logarithms contract by |p/2 - 1| a round
    p >= 4:  w <- tau_j(W^{1/2 - 1/p} K), the leverage scores of the reweighted keys, which raise the concave
             log det K' W^{1 - 2/p} K in every round
    Source: Cohen and Peng, 2015 (arXiv:1412.0588), for p < 4, where their iteration contracts; for p >= 4 they solve a
    convex program, whose multiplicative ascent (Titterington, 1976; Cohen et al., 2019, arXiv:1905.11580, for p = infinity)
    runs here.   Differs: a fixed number of rounds from leverage scores.
    Cost: three passes over the keys a round; memory beside the weights: one Gram matrix and a chunk of keys.

    Args:
        k: keys, live keys first.
        total: number of live keys of each list; None for all.
        power: p, at least 1 and finite.
        rounds: rounds of the iteration.

    Returns:
        positive weights, float64; 0 for keys that are not live or not finite. A power below 1 or infinite, or fewer rounds
        than 1, raise ValueError.
    """
    positive("lewis_weights", rounds=rounds)
    check_power("lewis_weights", power)
    rows = key_rows(k, total)
    return _iterate(rows, power, rounds).masked_fill(~rows.counts, 0.0)


def lewis_bounds(
    k: Float[Tensor, "lists keys head_dim"],
    total: Int[Tensor, "lists 1"] | None = None,
    *,
    power: float | int,
    rounds: int = 20,
) -> Float[Tensor, "lists keys"]:
    """Bound the sensitivity of each key for |q . k|^p from above, by Lewis weights.

    s_j = max_y |k_j . y|^p / sum_l |k_l . y|^p <= b_j.   With u_j = (k_j' (K' W^{1 - 2/p} K)^-1 k_j)^{p/2}, for all
    positive weights w, converged or not (by Hoelder's inequality; at Lewis weights u = w):
    p <= 2:  b_j = max_l (u_l / w_l)^{(2 - p)/p} u_j,   at Lewis weights b_j = w_j, and they add up to the rank, <= head_dim
    p > 2:   b_j = (sum_l w_l)^{p/2 - 1} u_j,           at Lewis weights they add up to rank^{p/2}
    Source: Lewis, 1978; Cohen and Peng, 2015 (arXiv:1412.0588).   Differs: bounds that hold before convergence.

    Args:
        k: keys, live keys first.
        total: number of live keys of each list; None for all.
        power: p, at least 1 and finite.
        rounds: rounds of the iteration; more rounds lower the bounds.

    Returns:
        bounds in [0, 1], float64; 0 for keys that are not live or not finite; other arguments raise as in `lewis_weights`.
    """
    positive("lewis_bounds", rounds=rounds)
    check_power("lewis_bounds", power)
    rows = key_rows(k, total)
    weight = _iterate(rows, power, rounds)
    own = _own(rows, weight, power)
    if power <= 2:
        worst = (own / weight).amax(1, keepdim=True) if own.shape[1] else own.sum(1, keepdim=True)
        return (worst ** ((2 - power) / power) * own).clamp(max=1.0)
    # keys of zeros add nothing to any row
    total_weight = weight.masked_fill(own == 0, 0.0).sum(1, keepdim=True)
    return (total_weight ** (power / 2 - 1) * own).clamp(max=1.0)


def check_power(owner: str, power: float | int) -> None:
    """Check the exponent of |q . k|^p.

    Args:
        owner: the class or function that has the argument, for the message.
        power: the exponent.

    Raises:
        ValueError: if it is below 1, infinite or NaN.
    """
    if not 1 <= power < math.inf:
        raise ValueError(f"{owner}: p is {power!r}; it must be a finite number of at least 1, for |q . k|^p")


def _iterate(rows: KeyRows, power: float | int, rounds: int) -> Tensor:
    weight = squared_norms(rows, whitened(rows)).clamp(min=_LEAST)
    for _ in range(rounds):
        own = _own(rows, weight, power)
        # leverage of the reweighted keys: w^{1 - 2/p} times k' (..)^-1 k
        weight = (own if power < 4 else weight ** (1 - 2 / power) * own ** (2 / power)).clamp(min=_LEAST)
    return weight


def _own(rows: KeyRows, weight: Tensor, power: float | int) -> Tensor:
    """Return (k_j' (K' W^{1 - 2/p} K)^-1 k_j)^{p/2} for all keys."""
    return squared_norms(rows, whitened(rows, weight ** (1 - 2 / power))) ** (power / 2)
