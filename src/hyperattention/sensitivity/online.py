"""Online leverage scores: each key is scored by the keys before it, in one pass."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.sensitivity.gram import whitening
from hyperattention.sensitivity.key_rows import KeyRows, key_rows

# keys whose scores come from one Cholesky factor
_BLOCK = 128


def online_leverage(
    k: Float[Tensor, "lists keys head_dim"], total: Int[Tensor, "lists 1"] | None = None, ridge: float | int = 1e-3
) -> Float[Tensor, "lists keys"]:
    """Return the leverage score of each key among itself and the keys before it; no score looks ahead.

    tau_t = x_t' (G_{t-1} + lambda I)^-1 x_t,   G_t = sum_{l <= t} x_l x_l',   score_t = tau_t / (1 + tau_t)
          = max_y (x_t . y)^2 / (sum_{l <= t} (x_l . y)^2 + lambda |y|^2)
    lambda = ridge * |first key that is not 0|^2 / head_dim

    A block of keys is whitened by the keys before the block, Z = X F; then 1 + tau_t are the squared diagonal entries of the
    Cholesky factor of I + Z Z', which is one small factorisation and no update per key.
    Source: Cohen, Musco and Pachocki, 2016 (arXiv:1604.05448), online leverage scores, for LevAttention in one pass.
    Differs: score / (1 + score) in place of the minimum of score and 1; no sampling.
    Guarantee: sum_t score_t <= log det(I + G / lambda) <= head_dim log(1 + sum_t |x_t|^2 / (head_dim lambda)).
    Memory beside the scores: the Gram matrix, and a block of keys.

    Args:
        k: keys, live keys first.
        total: number of live keys of each list; None for all.
        ridge: lambda relative to the mean square of a coordinate of the first key; positive.

    Returns:
        scores in [0, 1), float64; 0 for keys that are not live or not finite.

    Raises:
        ValueError: if the ridge is not positive.
    """
    if not ridge > 0:
        raise ValueError(f"online_leverage(ridge={ridge!r}): ridge must be positive; before head_dim keys G is singular")
    rows, dim = key_rows(k, total), k.shape[2]
    out = torch.zeros_like(rows.counts, dtype=torch.float64)
    if not out.numel():
        return out
    eye = torch.eye(dim, dtype=torch.float64, device=k.device)
    block = torch.eye(_BLOCK, dtype=torch.float64, device=k.device)
    seen = (ridge * _first_square(rows) / dim)[:, None, None] * eye
    for part, x in rows.chunks(_BLOCK):
        # always blocks of one size: the bits of a score must not depend on how many keys follow
        x = pad(x, (0, 0, 0, _BLOCK - x.shape[1]))
        z = x @ whitening(seen)
        factor = torch.linalg.cholesky_ex(block + z @ z.mT)[0]
        score = 1.0 - factor.diagonal(dim1=1, dim2=2).square().reciprocal()
        out[:, part] = score[:, : part.stop - part.start].clamp(0.0, 1.0)
        seen = seen + x.mT @ x
    return out.masked_fill(~rows.counts, 0.0)


def _first_square(rows: KeyRows) -> Tensor:
    """Return the squared norm of the first key of each list that counts and is not 0, ``[lists]``; 1 if there is none."""
    first = rows.k.new_zeros(rows.k.shape[0], dtype=torch.float64)
    for _, x in rows.chunks():
        square = x.square().sum(-1)
        place = (square > 0).byte().argmax(1, keepdim=True)
        first = torch.where(first > 0, first, square.gather(1, place)[:, 0])
    return torch.where(first > 0, first, 1.0)
