"""Sensitivities for even powers: |q . k|^p is a square of products of k^{(x) p/2}, whose leverage scores bound them."""

import math
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.sensitivity.gram import squared_norms, whitened
from hyperattention.sensitivity.key_rows import KeyRows, key_rows

# the square matrix of one list, float64: features of up to 11,585 numbers, or as many keys
MOST_BYTES = 2**30
# rows whose features exist at a time
_CHUNK = 256


def even_power_leverage(
    k: Float[Tensor, "lists keys head_dim"], total: Int[Tensor, "lists 1"] | None = None, *, power: int
) -> Float[Tensor, "lists keys"]:
    """Return the leverage score of every k_j^{(x) power/2}: an upper bound of the key's sensitivity for |q . k|^power.

    s_j = max_y (k_j . y)^p / sum_l (k_l . y)^p <= tau_j(K^{(x) p/2}),   sum_j tau_j <= C(head_dim + p/2 - 1, p/2)

    The tensor power is symmetric, so features are its distinct monomials. They exist for a chunk of keys at a time. With
    fewer keys than monomials the Gram matrix is that of the keys, (k_i . k_j)^{p/2}, and no feature exists at all.
    Source: Kannan et al., 2024 (arXiv:2410.05462), d^{p/2}/eps keys; that they use these leverage scores is remembered and
    unconfirmed.   Differs: distinct monomials only, which lowers d^{p/2} to C(d + p/2 - 1, p/2).
    Cost: the square of the number of monomials (or of keys) in memory, for one list at a time, and as many products per key.

    Args:
        k: keys, live keys first.
        total: number of live keys of each list; None for all.
        power: p, even and positive.

    Returns:
        scores in [0, 1], float64; 0 for keys that are not live or not finite.

    Raises:
        ValueError: if the power is not even, or the matrix exceeds the limit of 1 GiB.
    """
    if power < 2 or power % 2:
        raise ValueError(f"even_power_leverage(power={power!r}): the power must be even and at least 2")
    rows, (_, keys, dim) = key_rows(k, total), k.shape
    monomials = math.comb(dim + power // 2 - 1, power // 2)
    side = min(keys, monomials)
    if 8 * side**2 > MOST_BYTES:
        raise ValueError(
            f"power={power}, head_dim={dim}, {keys} keys: the tensor power has {monomials:,} distinct coordinates, and the "
            f"smaller Gram matrix {8 * side**2 / 2**30:,.1f} GiB, above the limit of {MOST_BYTES / 2**30:g} GiB: use a "
            "smaller power, or hyperattention.sensitivity.lewis_bounds, whose matrices are head_dim x head_dim"
        )
    # a linear map of the keys changes no score; whitened keys keep powers of small keys above the rounding
    white = whitened(rows)
    out = torch.zeros_like(rows.counts, dtype=torch.float64)
    for index in range(len(k) if keys else 0):
        own, factor = rows.of_list(index), white[index : index + 1]
        out[index] = _by_keys(own, factor, power // 2) if keys <= monomials else _by_monomials(own, factor, power // 2)
    return out.clamp(0.0, 1.0)


def _by_keys(rows: KeyRows, white: Tensor, degree: int) -> Tensor:
    """Return the scores of one list from the kernel matrix (x_i . x_j)^degree: the squared rows of its eigenvectors."""
    x = torch.cat([x[0] for _, x in rows.chunks()]) @ white[0]
    value, vector = torch.linalg.eigh((x @ x.T) ** degree)
    least = len(x) * torch.finfo(x.dtype).eps * value[-1]
    return (vector.square() * (value > least)).sum(1)


def _by_monomials(rows: KeyRows, white: Tensor, degree: int) -> Tensor:
    """Return the scores of one list from the Gram matrix of its monomials."""
    index, root = _monomials(white.shape[-1], degree, white)

    def features(x: Tensor) -> Tensor:
        x = x @ white
        made = root
        for place in index:
            made = made * x[..., place]
        return made

    factor = whitened(rows, features=features, chunk=_CHUNK)
    return squared_norms(rows, factor, features, chunk=_CHUNK)[0]


def _monomials(dim: int, degree: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """List the monomials of a degree: their coordinates, ``[degree, monomials]``, and roots of multinomial coefficients."""
    chosen = list(combinations_with_replacement(range(dim), degree))
    counts = [math.factorial(degree) / math.prod(math.factorial(each.count(i)) for i in {*each}) for each in chosen]
    index = torch.tensor(chosen, dtype=torch.int64, device=like.device).T.contiguous()
    return index, torch.tensor(counts, dtype=torch.float64, device=like.device).sqrt()
