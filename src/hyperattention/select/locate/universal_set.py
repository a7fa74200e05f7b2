"""One set of keys for all queries: the keys with the largest leverage scores."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from hyperattention.check import positive
from hyperattention.select.score.keys_left import key_runs
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage
from hyperattention.sensitivity.leverage import leverage
from hyperattention.tiling import Tiles
from hyperattention.types import Runs


@dataclass(frozen=True)
class UniversalSet(Stage):
    """Take the `num` keys with the largest leverage scores: the keys that can get the most weight from an arbitrary query.

    tau_j = x_j' (X'X + lambda I)^-1 x_j,   x_j = k_j - mean,   lambda = ridge * trace(X'X) / head_dim
    Source: Kannan et al., 2024 (arXiv:2410.05462), LevAttention, for weights |q . k|^2.   Differs: centred keys and a ridge;
    softmax in place of the paper's polynomial, for which the scores are a heuristic; causal queries see the visible keys of
    the set; leading keys that sinks took are not taken again.
    Cost: `num` slots per query, 2 head_dim products per key.   Guarantee: exact on the pairs taken; for softmax these keys
    need not have large weights, so a Draw should follow.

    Args:
        num: number of keys taken, the same for every tile.
        ridge: strength of the ridge, relative to the mean square of the centred keys.

    Raises:
        ValueError: if `num` is not positive, or the ridge is negative.
    """

    num: int
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        positive("UniversalSet", num=self.num)
        if not self.ridge >= 0:
            raise ValueError(f"UniversalSet(ridge={self.ridge!r}): ridge must not be negative; 0 turns it off")

    @property
    def looks_ahead(self) -> LookAhead:
        """The choice depends on all keys."""
        return LookAhead.SEQUENCE

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile."""
        return self.num

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count a covariance and a factor: twice `head_dim` products of a key."""
        return 2.0 * head_dim

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Score all keys, and take the best for every tile."""
        problem = tiles.problem
        if not problem.k.shape[0] * problem.num_keys * len(tiles.index):
            return (), covered
        total = tiles.by_list(tiles.total)  # [lists, 1]
        key = torch.arange(problem.num_keys, dtype=torch.int64, device=problem.device)
        score = leverage(problem.k.flatten(0, 1), total, self.ridge, centred=True)
        score = score.masked_fill(key < covered.prefix, -torch.inf)
        best, index = score.topk(min(self.num, problem.num_keys), dim=-1)
        index = index.masked_fill(best == -torch.inf, problem.num_keys).sort(-1)[0]
        index = pad(index, (0, self.num - index.shape[1]), value=problem.num_keys)
        index = index[:, None].expand(-1, len(tiles.index), -1).contiguous()
        runs = key_runs(tiles, covered, index, torch.zeros(index.shape, dtype=torch.float32, device=index.device))
        return (runs,), covered.with_blocks(index, 1)
