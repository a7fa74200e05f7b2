"""Principal directions of keys, without a device synchronisation, which an eigenvalue solver would need."""

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.random import normal

ROUNDS = 2
# a share of the trace is added to a Gram matrix, so that its factor exists even if keys span too few directions
_RIDGE = 1e-12


def random_directions(dim: int, width: int, device: torch.device) -> Float[Tensor, "dim width"]:
    """Draw the directions from which the search begins: always the same.

    Args:
        dim: numbers in a direction.
        width: number of directions.
        device: device of the directions.

    Returns:
        the directions, as columns, in float64.
    """
    rows, columns = (torch.arange(n, dtype=torch.int64, device=device) for n in (dim, width))
    return normal((rows[:, None], columns), device)


def principal_directions(
    keys: Float[Tensor, "lists keys head_dim"], width: int, begin: Float[Tensor, "head_dim width"] | None = None
) -> Float[Tensor, "lists head_dim width"]:
    """Find orthonormal directions that carry nearly as much of the keys' variance as any `width` directions can.

    Y <- orth(C Y), a few times, from random Y;   C = covariance of the keys
    Source: Halko, Martinsson and Tropp, 2011, alg. 4.4, randomised subspace iteration; orthonormal by Cholesky factors,
    twice, in float64.   Differs: no oversampling.
    Cost: O(keys * head_dim^2) once.   Guarantee: none needed; the directions serve an estimate.

    Args:
        keys: some keys; numbers that are not finite count as 0.
        width: number of directions, at most ``head_dim``.
        begin: from `random_directions`, for a caller that searches several times; None draws them.

    Returns:
        the directions, as columns.
    """
    centred = torch.nan_to_num(keys.double(), posinf=0.0, neginf=0.0)
    centred = centred - centred.mean(1, keepdim=True)
    covariance = centred.transpose(1, 2) @ centred
    begin = random_directions(covariance.shape[1], width, keys.device) if begin is None else begin
    directions = begin.expand(len(covariance), -1, -1)
    for _ in range(ROUNDS):
        directions = _orthonormal(covariance @ _orthonormal(covariance @ directions))
    return _orthonormal(directions).to(keys.dtype)


def _orthonormal(columns: Tensor) -> Tensor:
    gram = columns.transpose(1, 2) @ columns
    ridge = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None] * _RIDGE
    # the smallest normal number keeps the factor of a zero matrix finite
    gram = gram + torch.diag_embed((ridge + torch.finfo(gram.dtype).tiny).expand(-1, gram.shape[1]))
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(factor.transpose(1, 2), columns, upper=True, left=False)
