"""Upper bounds of sensitivities for |q . k|^p, by the best method for each p, and the bound of their sum."""

import math

from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.sensitivity.even_power import even_power_leverage
from hyperattention.sensitivity.leverage import leverage
from hyperattention.sensitivity.lewis import check_power, lewis_bounds


def sensitivity_bounds(
    k: Float[Tensor, "lists keys head_dim"], total: Int[Tensor, "lists 1"] | None = None, *, power: float | int
) -> Float[Tensor, "lists keys"]:
    """Bound s_j = max_y |k_j . y|^p / sum_l |k_l . y|^p: the largest weight that key j can have in the row of any query.

    p = 2: leverage scores, equal to s_j.   other even p: leverage scores of tensor powers.   any other p >= 1: Lewis weights

    Args:
        k: keys, live keys first.
        total: number of live keys of each list; None for all.
        power: p, at least 1 and finite.

    Returns:
        float64; 0 for keys that are not live or not finite; a wrong or too large power raises ValueError.
    """
    check_power("sensitivity_bounds", power)
    if power == 2:
        return leverage(k, total)
    if power % 2 == 0:
        return even_power_leverage(k, total, power=int(power))
    return lewis_bounds(k, total, power=power)


def sum_of_bounds(head_dim: int, power: float | int) -> float:
    """Bound the sum of `sensitivity_bounds` over any number of keys: a share eps is exceeded by at most sum / eps keys.

    Args:
        head_dim: width of the keys, d.
        power: p.

    Returns:
        d for p <= 2; C(d + p/2 - 1, p/2) <= d^{p/2} for even p; d^{p/2} for other p above 2, at converged Lewis weights.
    """
    check_power("sum_of_bounds", power)
    if power % 2 == 0:
        return float(math.comb(head_dim + int(power) // 2 - 1, int(power) // 2))
    return float(head_dim) ** max(1.0, power / 2)
