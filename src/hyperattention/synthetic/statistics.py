"""Statistics of the keys of heads: in how few directions they vary, and how alike neighbours are."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

# the first keys are sinks in most models, far from all others, and would count as a direction of their own
SKIPPED = 16
DIRECTIONS, LAGS = (8, 16, 32), (1, 8, 64)


@dataclass(frozen=True)
class KeyStatistics:
    """What describes the keys of one head, about their mean and without the first 16.

    Args:
        shares: share of the variance in the 8, 16 and 32 principal directions.
        rank: least number of principal directions that hold 90% of the variance.
        likeness: mean cosine of two keys that are 1, 8 and 64 tokens apart.
    """

    shares: tuple[float, ...]
    rank: int
    likeness: tuple[float, ...]


def key_statistics(k: Float[Tensor, "batch kv_heads keys head_dim"]) -> list[KeyStatistics]:
    """Measure the keys of every head.

    Args:
        k: keys as attention reads them, with positions applied; more than 80 of them.

    Returns:
        the statistics of each head of each batch entry.

    Raises:
        ValueError: if there are too few keys.
    """
    if k.shape[2] <= SKIPPED + max(LAGS):
        raise ValueError(f"{k.shape[2]} keys are too few for these statistics: give more than {SKIPPED + max(LAGS)}")
    return [_of_head(head) for head in k[:, :, SKIPPED:].flatten(0, 1)]


def _of_head(k: Float[Tensor, "keys head_dim"]) -> KeyStatistics:
    # float64, so that small variances are not lost in the sums over all keys
    x = k.double()
    x = x - x.mean(0)
    variances = torch.linalg.eigvalsh(x.T @ x).flip(0)
    held = variances.cumsum(0) / variances.sum()
    shares = tuple(float(held[min(count, len(held)) - 1]) for count in DIRECTIONS)
    likeness = tuple(float(cosine_similarity(x[lag:], x[:-lag], dim=-1).mean()) for lag in LAGS)
    return KeyStatistics(shares, int((held < 0.9).sum()) + 1, likeness)
