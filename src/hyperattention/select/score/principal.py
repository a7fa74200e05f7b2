"""Principal directions of keys, without a device synchronisation, which an eigenvalue solver would need."""

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.random import normal

_ROUNDS = 2
# a share of the trace is added to a Gram matrix, so that its factor exists even if keys span too few directions
_RIDGE = 1e-12


def principal_directions(keys: Float[Tensor, "lists keys head_dim"], width: int) -> Float[Tensor, "lists head_dim width"]:
    """Find orthonormal directions that carry nearly as much of the keys' variance as any `width` directions can.

    Y <- orth(C Y), a few times, from random Y;   C = covariance of the keys
    Source: Halko, Martinsson and Tropp, 2011, alg. 4.4, randomised subspace iteration; orthonormal by Cholesky factors,
    twice, in float64.   Differs: no oversampling.
    Cost: O(keys * head_dim^2) once.   Guarantee: none needed; the directions serve an estimate.

    Args:
        keys: some keys; numbers that are not finite count as 0.
        width: number of directions, at most ``head_dim``.

    Returns:
        the directions, as columns.
    """
    centred = torch.nan_to_num(keys.double(), posinf=0.0, neginf=0.0)
    centred = centred - centred.mean(1, keepdim=True)
    covariance = centred.transpose(1, 2) @ centred
    dim = covariance.shape[1]
    rows, columns = (torch.arange(n, dtype=torch.int64, device=keys.device) for n in (dim, width))
    directions = normal((rows[:, None], columns), keys.device).expand(len(covariance), -1, -1)
    for _ in range(_ROUNDS):
        directions = _orthonormal(covariance @ _orthonormal(covariance @ directions))
    return _orthonormal(directions).to(keys.dtype)


def _orthonormal(columns: Tensor) -> Tensor:
    gram = columns.transpose(1, 2) @ columns
    ridge = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None] * _RIDGE
    # the smallest normal number keeps the factor of a zero matrix finite
    gram = gram + torch.diag_embed((ridge + torch.finfo(gram.dtype).tiny).expand(-1, gram.shape[1]))
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(factor.transpose(1, 2), columns, upper=True, left=False)
