"""Norms, alpha and kappa of the softmax matrix, estimated from a few exact rows: the matrix is never formed.

Rows come in blocks that may end before the last key: the keys cut off are hidden from every row of the block and count as 0.
"""

from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

# rows squared at a time, so that the squares stay in the cache
_SQUARED_ROWS = 8
# each step reads all values twice; two steps reach .999 of the norm on structured inputs, and .93 on Gaussian ones
_POWER_STEPS = 2


def column_spread(blocks: list[Float[Tensor, "*heads _ _"]], num_keys: int) -> Float[Tensor, "*heads"]:
    """Estimate alpha, the paper's measure of the largest total attention that one key gets from all queries.

    alpha = keys * max_j ||P e_j||^2,  estimated by keys * (keys / rows) * max_j sum_i P_ij^2 over the sampled rows i.
    Source: Han et al., 2023 (arXiv:2310.05869), assumption on alpha.   Differs: with as many queries as keys, nothing;
    otherwise the mean over the available queries replaces the mean over `keys` queries.
    Guarantee: unbiased for each column, so biased upwards for the largest column: one sharp row among `rows` counts as keys
    / rows such rows. Accurate if attention sinks dominate.

    Args:
        blocks: sampled rows P of the softmax matrix; a row that sees no key is 0.
        num_keys: columns of the entire matrix.

    Returns:
        the estimate.
    """
    squares = blocks[0].new_zeros((*blocks[0].shape[:-2], num_keys))
    for block in blocks:
        for few in block.split(_SQUARED_ROWS, dim=-2):
            squares[..., : block.shape[-1]] += few.square().sum(-2)
    return squares.amax(-1) * (num_keys * num_keys / sum(block.shape[-2] for block in blocks))


def residual_ratio(
    blocks: list[Float[Tensor, "*heads _ _"]],
    lse: Float[Tensor, "*heads rows"],
    first: int,
    windows: list[tuple[int, int]],
) -> Float[Tensor, "*heads"]:
    """Bound kappa from below: the ratio of the largest to the smallest row sum after the heavy entries are removed.

    kappa = max_i s_i / min_i s_i,  s_i = sum of exp(scale q_i.k_j) over the keys j outside row i's heavy mask.
    Source: Han et al., 2023 (arXiv:2310.05869), definition of kappa.   Differs: only over sampled rows that have weight
    outside the mask.
    Guarantee: at most the kappa of all rows.

    Args:
        blocks: sampled rows of the softmax matrix.
        lse: their log-sum-exp.
        first: keys before it are heavy in every row.
        windows: for each row the keys [begin, end) around it that are heavy.

    Returns:
        the ratio; NaN if no row has weight outside the mask.
    """
    left = iter(windows)
    light = torch.cat([light_weight(block, first, list(islice(left, block.shape[-2]))) for block in blocks], -1)
    log_sum, none = lse + light.log(), light == 0
    largest = log_sum.masked_fill(none, -torch.inf).amax(-1)
    smallest = log_sum.masked_fill(none, torch.inf).amin(-1)
    return (largest - smallest).exp().masked_fill(none.all(-1), torch.nan)


def light_weight(
    block: Float[Tensor, "*heads rows _"], first: int, windows: list[tuple[int, int]], *, at_once: bool | None = None
) -> Float[Tensor, "*heads rows"]:
    """Sum each row's weights outside its heavy mask.

    Args:
        block: rows of the softmax matrix.
        first: keys before it are heavy in every row.
        windows: for each row the keys [begin, end) around it that are heavy.
        at_once: whether to use one pass with a mask of rows x keys; None: one pass on all devices except a CPU, where sums
            of slices cost less.

    Returns:
        the sums.
    """
    if block.device.type != "cpu" if at_once is None else at_once:
        begin, end = torch.tensor(windows, dtype=torch.int64, device=block.device)[..., None].unbind(1)
        key = torch.arange(block.shape[-1], dtype=torch.int64, device=block.device)
        heavy = (key < first) | ((key >= begin) & (key < end))
        # not a product: 0 times infinity would be NaN
        return block.masked_fill(heavy, 0.0).sum(-1)
    rows = zip(block.unbind(-2), windows, strict=True)
    return torch.stack([_outside(row, first, *window) for row, window in rows], dim=-1)


def _outside(row: Float[Tensor, "*heads _"], first: int, begin: int, end: int) -> Float[Tensor, "*heads"]:
    before = row[..., first : max(first, begin)].sum(-1)
    return before if end >= row.shape[-1] else before + row[..., max(first, end) :].sum(-1)


def softmax_norm(
    blocks: list[Float[Tensor, "*heads _ _"]], num_keys: int, num_queries: int, num_live: int
) -> Float[Tensor, "*heads"]:
    """Estimate the operator norm of the softmax matrix from sampled rows; the estimate tends to be too small.

    ||P||^2 >= ||P x||^2 / ||x||^2 for any x. Two vectors x are tried. For a constant x the ratio is live queries / keys. The
    other x is the sum of every second sampled row, evaluated on the remaining rows (and vice versa), so that no row is
    evaluated on a direction that it helped to choose. The plug-in estimate, the norm of the sampled rows themselves, would
    overestimate the norm of a diagonal matrix by sqrt(queries / rows).
    Guarantee: each term is an unbiased estimate of a lower bound of ||P||^2; close to it if attention sinks dominate.

    Args:
        blocks: sampled rows, one from each of equal strata in order; a row that sees no key is 0.
        num_keys: columns of the entire matrix.
        num_queries: rows of the entire matrix.
        num_live: number of sampled rows that see at least one key.

    Returns:
        the estimate.
    """
    rows = sum(block.shape[-2] for block in blocks)
    constant = num_live * num_queries / rows / num_keys
    sums = [blocks[0].new_zeros((*blocks[0].shape[:-2], num_keys)) for _ in range(2)]
    images = [blocks[0].new_zeros(blocks[0].shape[:-2]) for _ in range(2)]
    # blocks may have odd heights; each is halved separately
    for block in blocks:
        for half, other in enumerate(sums):
            other[..., : block.shape[-1]] += block[..., half::2, :].sum(-2)
    for block in blocks:
        for half, image in enumerate(images):
            image += (block[..., 1 - half :: 2, :] @ sums[half][..., : block.shape[-1], None]).square().sum((-1, -2))
    lengths = [x.square().sum(-1) for x in sums]
    ratios = [image / length.masked_fill(length == 0, 1.0) for image, length in zip(images, lengths, strict=True)]
    # each half stands for half of the queries
    squared = (ratios[0] + ratios[1]) * (num_queries / rows)
    return squared.clamp(min=constant).sqrt()


def value_norm(v: Float[Tensor, "*heads keys value_dim"]) -> Float[Tensor, "*heads"]:
    """Bound the operator norm of the values from below by a few power steps, much cheaper than by their Gram matrix.

    Args:
        v: values.

    Returns:
        ||V x|| / ||x|| for the x reached, starting from the sum of the rows.
    """
    x = v.sum(-2).unsqueeze(-1)
    for _ in range(_POWER_STEPS):
        x = v.transpose(-1, -2) @ (v @ torch.nn.functional.normalize(x, dim=-2))
    # the last image is V'V times a unit vector; its length is at most the squared norm
    return torch.linalg.vector_norm(x, dim=(-1, -2)).sqrt()


def operator_norm(rows: Float[Tensor, "*heads rows columns"]) -> Float[Tensor, "*heads"]:
    """Compute the largest singular value, through the smaller of the two Gram matrices.

    Args:
        rows: the matrices.

    Returns:
        their operator norms; NaN where an entry is not finite, for which LAPACK would raise.
    """
    tall = rows.shape[-2] > rows.shape[-1]
    gram = rows.transpose(-1, -2) @ rows if tall else rows @ rows.transpose(-1, -2)
    broken = ~gram.isfinite().all(-1).all(-1)
    largest = torch.linalg.eigvalsh(gram.masked_fill(broken[..., None, None], 0.0))[..., -1]
    return largest.clamp(min=0).masked_fill(broken, torch.nan).sqrt()
