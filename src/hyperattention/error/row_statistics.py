"""What a few exact rows of the softmax matrix tell of the whole: norms, alpha and kappa, without ever forming it.

Rows come in blocks that may end before the last key: what is cut off is hidden from every row of the block, and 0.
"""

from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

# rows squared at a time, so that the squares stay in the cache
_SQUARED_ROWS = 8
# each reads all values twice; two reach .999 of the norm on structured inputs, and .93 on Gaussian ones
_POWER_STEPS = 2


def column_spread(blocks: list[Float[Tensor, "*heads _ _"]], num_keys: int) -> Float[Tensor, "*heads"]:
    """Estimate alpha, the paper's measure of how much any one key is worth to all queries together.

    alpha = keys * max_j ||P e_j||^2,  estimated by keys * (keys / rows) * max_j sum_i P_ij^2 over the sampled rows i.
    Source: Han et al., 2023 (arXiv:2310.05869), assumption on alpha.   Differs: with as many queries as keys, nothing;
    otherwise the mean over the queries there are stands for the mean over `keys` of them.
    Guarantee: unbiased for each column, so biased upwards for the largest: one sharp row among `rows` counts for
    keys / rows of its like. Accurate where sinks dominate.

    Args:
        blocks: sampled rows P of the softmax matrix; a row that sees nothing is 0.
        num_keys: columns of the whole matrix.

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
    """Bound kappa from below: how unequal the rows' sums are once the heavy entries are taken out.

    kappa = max_i s_i / min_i s_i,  s_i = sum of exp(scale q_i.k_j) over the keys j outside row i's heavy mask.
    Source: Han et al., 2023 (arXiv:2310.05869), definition of kappa.   Differs: over the sampled rows only, and over
    those with any weight outside the mask.
    Guarantee: at most the kappa of all rows.

    Args:
        blocks: sampled rows of the softmax matrix.
        lse: their log-sum-exp.
        first: keys before it are heavy in every row.
        windows: for each row the keys [begin, end) around it that are heavy.

    Returns:
        the ratio; NaN where no row has weight outside the mask.
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
        at_once: whether to do it in one pass, by a mask of rows x keys: None does so on all devices but a CPU, where sums of
            slices cost less.

    Returns:
        the sums.
    """
    if block.device.type != "cpu" if at_once is None else at_once:
        begin, end = torch.tensor(windows, dtype=torch.int64, device=block.device)[..., None].unbind(1)
        key = torch.arange(block.shape[-1], dtype=torch.int64, device=block.device)
        heavy = (key < first) | ((key >= begin) & (key < end))
        # not a product: 0 times what is not finite would be no number
        return block.masked_fill(heavy, 0.0).sum(-1)
    rows = zip(block.unbind(-2), windows, strict=True)
    return torch.stack([_outside(row, first, *window) for row, window in rows], dim=-1)


def _outside(row: Float[Tensor, "*heads _"], first: int, begin: int, end: int) -> Float[Tensor, "*heads"]:
    before = row[..., first : max(first, begin)].sum(-1)
    return before if end >= row.shape[-1] else before + row[..., max(first, end) :].sum(-1)


def softmax_norm(
    blocks: list[Float[Tensor, "*heads _ _"]], num_keys: int, num_queries: int, num_live: int
) -> Float[Tensor, "*heads"]:
    """Estimate the operator norm of the softmax matrix from sampled rows, so that it is rather too small than too large.

    ||P||^2 >= ||P x||^2 / ||x||^2 for any x. Two are tried: x constant, for which it is live queries / keys; and x
    the sum of every other sampled row, judged on the rows between them (and the other way round), so that no row judges a
    direction of its own making. The norm of the sampled rows themselves, the plug-in, would overstate the norm of a
    diagonal matrix by sqrt(queries / rows).
    Guarantee: each term is an unbiased estimate of a lower bound of ||P||^2; close where sinks dominate.

    Args:
        blocks: sampled rows, one from each of equal strata in order; a row that sees nothing is 0.
        num_keys: columns of the whole matrix.
        num_queries: its rows.
        num_live: sampled rows that see anything.

    Returns:
        the estimate.
    """
    rows = sum(block.shape[-2] for block in blocks)
    constant = num_live * num_queries / rows / num_keys
    sums = [blocks[0].new_zeros((*blocks[0].shape[:-2], num_keys)) for _ in range(2)]
    images = [blocks[0].new_zeros(blocks[0].shape[:-2]) for _ in range(2)]
    # blocks may have odd heights; each is halved by itself
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
    """Bound the operator norm of the values from below by a few power steps, at a fraction of their Gram matrix's cost.

    Args:
        v: values.

    Returns:
        ||V x|| / ||x|| for the x reached, starting from the sum of the rows.
    """
    x = v.sum(-2).unsqueeze(-1)
    for _ in range(_POWER_STEPS):
        x = v.transpose(-1, -2) @ (v @ torch.nn.functional.normalize(x, dim=-2))
    # the last image is V'V of a unit vector, whose length is at most the squared norm
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
