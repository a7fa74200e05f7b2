"""Gram matrices of keys, their sums over workers, and the matrix that whitens a Gram matrix."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from hyperattention.sensitivity.key_rows import CHUNK, KeyRows

# added to the diagonal of a Gram matrix that is scaled to a diagonal of ones: above the rounding of its entries
_JITTER = 1e-12


def gram(
    rows: KeyRows,
    weight: Float[Tensor, "lists keys"] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    *,
    chunk: int = CHUNK,
) -> Float[Tensor, "lists dim dim"]:
    """Sum the outer products of the rows: sum_j weight_j x_j x_j', in one pass.

    Args:
        rows: the keys.
        weight: weight of each key; ones if None.
        features: applied to each chunk of rows; None leaves them as they are.
        chunk: rows read at a time.

    Returns:
        the Gram matrix of each list, float64. Memory: that matrix, and one chunk.
    """
    total = None
    for part, x in rows.chunks(chunk):
        x = x if features is None else features(x)
        right = x if weight is None else x * weight[:, part, None]
        total = x.mT @ right if total is None else total.baddbmm_(x.mT, right)
    if total is None:
        dim = rows.k.shape[2]
        return rows.k.new_zeros((rows.k.shape[0], dim, dim), dtype=torch.float64)
    return total


def sum_grams(grams: Sequence[Float[Tensor, "lists dim dim"]]) -> Float[Tensor, "lists dim dim"]:
    """Add the Gram matrices that several workers computed from their shares of the keys.

    Args:
        grams: one Gram matrix of each worker, all of the same lists.

    Returns:
        the Gram matrix of all keys.

    Raises:
        ValueError: if there is none, or their shapes differ.
    """
    shapes = sorted({tuple(each.shape) for each in grams})
    if len(shapes) != 1:
        raise ValueError(
            f"Gram matrices of shapes {shapes} cannot be added: give at least one, all of the same lists and head_dim"
        )
    return torch.stack(list(grams)).sum(0)


def reduce_gram(
    own: Float[Tensor, "lists dim dim"], group: "dist.ProcessGroup | None" = None
) -> Float[Tensor, "lists dim dim"]:
    """Add the Gram matrices of all processes of a group, each of which holds a share of the keys.

    Args:
        own: the Gram matrix of this process's keys.
        group: the process group; None for the default one.

    Returns:
        the Gram matrix of all keys, the same in every process; `own` is left as it is.
    """
    total = own.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return total


def whitening(g: Float[Tensor, "lists dim dim"], ridge: float | int = 0.0) -> Float[Tensor, "lists dim dim"]:
    """Return F with F F' = (g + lambda I)^-1 on the range of g, lambda = ridge * trace(g) / dim, by a Cholesky factor.

    The matrix is scaled to a diagonal of ones first, which changes no leverage score, so coordinates of any size count.
    A matrix without full rank gets 1e-12 on that diagonal: rows in the range of g keep their scores, but for directions
    whose share after scaling is hardly above 1e-12; see `whitened`.

    Args:
        g: Gram matrices, float64.
        ridge: strength of the ridge, relative to the mean of the diagonal.

    Returns:
        one matrix for each list; not finite where `g` is not.
    """
    size = g.diagonal(dim1=-2, dim2=-1)
    least = ridge * size.mean(-1, keepdim=True)
    size = size + least
    scale = torch.where(size > 0, size.clamp(min=torch.finfo(g.dtype).tiny).rsqrt(), 0.0)
    scaled = (g + torch.diag_embed(least.expand_as(size))) * scale[..., None] * scale[..., None, :]
    return scale[..., None] * _inverse_factor(scaled)


def whitened(
    rows: KeyRows,
    weight: Float[Tensor, "lists keys"] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    ridge: float | int = 0.0,
    *,
    chunk: int = CHUNK,
) -> Float[Tensor, "lists dim dim"]:
    """Return the whitening of the rows' Gram matrix; without a ridge it is refined by a second pass.

    The second Gram matrix is that of whitened rows, next to the identity: what the first Cholesky factor lost in directions
    of a share of 1e-12 is found again.

    Args:
        rows: the keys.
        weight: as in `gram`.
        features: as in `gram`.
        ridge: as in `whitening`.
        chunk: rows read at a time.

    Returns:
        F with F F' = (X'X + lambda I)^-1 on the range of X.
    """
    first = whitening(gram(rows, weight, features, chunk=chunk), ridge)
    if ridge > 0:
        return first

    def again(x: Tensor) -> Tensor:
        return (x if features is None else features(x)) @ first

    # not scaled: where the rows have no share, there is only rounding
    return first @ _inverse_factor(gram(rows, weight, again, chunk=chunk))


def _inverse_factor(g: Tensor) -> Tensor:
    """Return L^-T of g + jitter = L L'."""
    dim = g.shape[-1]
    eye = torch.eye(dim, dtype=g.dtype, device=g.device)
    jitter = max(_JITTER, 8 * dim * torch.finfo(g.dtype).eps)
    # a factorisation with error checks would make the host wait, and raise for numbers that are not finite
    factor = torch.linalg.cholesky_ex(g + jitter * eye)[0]
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False).mT


def squared_norms(
    rows: KeyRows,
    factor: Float[Tensor, "lists dim width"],
    features: Callable[[Tensor], Tensor] | None = None,
    *,
    chunk: int = CHUNK,
) -> Float[Tensor, "lists keys"]:
    """Return ||factor' x_j||^2 of every row: its leverage score, if the factor is the whitening of the Gram matrix.

    Args:
        rows: the keys.
        factor: a matrix for each list.
        features: applied to each chunk of rows, as in `gram`.
        chunk: rows read at a time.

    Returns:
        float64; 0 for keys that do not count.
    """
    out = torch.zeros_like(rows.counts, dtype=torch.float64)
    for part, x in rows.chunks(chunk):
        out[:, part] = ((x if features is None else features(x)) @ factor).square().sum(-1)
    return out
