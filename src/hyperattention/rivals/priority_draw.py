"""Priority sampling: a fixed number of draws that includes every heavy key."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.check import positive
from hyperattention.random import uniform
from hyperattention.select.score.keys_left import key_runs, keys_left
from hyperattention.select.score.pooling import chunks, edges, pool_queries
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage
from hyperattention.tiling import Tiles
from hyperattention.types import Runs

# counter after the five of every draw, so that no other draw shares these bits
_STREAM = 3


@dataclass(frozen=True)
class PriorityDraw(Stage):
    """Score every remaining key, and keep the `num` keys of the highest priority: weight divided by a uniform number.

    w_j = (1 - share) max_i softmax_j(q_i . k_j) / sum + share / N,   priority_j = w_j / u_j,   tau = the (num + 1)-th
    largest priority;   weight_j = max(1, tau / w_j),   i over the pooled queries of the tile
    Source: Duffield, Lund and Thorup, 2007, priority sampling; for attention Zharkov et al., 2026.   Differs: one sample per
    tile, by its pooled queries, where the cited method has one per query, found by vector search; every key is scored here;
    a uniform share bounds the weights.
    Cost: `num` slots per query, `pooled` / tile of exact attention's products: quadratic in the length.
    Guarantee: E[weight of a key] = 1 for every remaining key; keys heavier than tau are listed for certain, with weight 1.

    Args:
        num: number of keys drawn for each tile.
        pooled: averaged queries per tile and head.
        uniform_share: share of the weights that is spread uniformly over the remaining keys.

    Raises:
        ValueError: if a number is not positive, or the share is not between 0 and 1.
    """

    num: int
    pooled: int = 16
    uniform_share: float = 0.1

    def __post_init__(self) -> None:
        positive("PriorityDraw", num=self.num, pooled=self.pooled)
        if not 0.0 < self.uniform_share < 1.0:
            raise ValueError(
                f"PriorityDraw(uniform_share={self.uniform_share}): it must be between 0 and 1 to bound the weights"
            )

    @property
    def complete(self) -> bool:
        """True: every remaining key has an expected weight of one."""
        return True

    @property
    def tells_error(self) -> bool:
        """False: slots are not strata, from whose differences an error could be estimated."""
        return False

    @property
    def looks_ahead(self) -> LookAhead:
        """Draws of a tile depend on all of its queries."""
        return LookAhead.TILE

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile."""
        return self.num

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count products of pooled queries with all keys, per query."""
        return min(self.pooled, tile) / tile * num_keys / (2 if causal else 1)

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Score, and keep the keys of the highest priority."""
        problem = tiles.problem
        if not problem.k.shape[0] * problem.num_keys * len(tiles.index):
            return (), covered
        query, left = pool_queries(tiles, self.pooled, problem.scale), edges(tiles, covered)
        k = problem.k.flatten(0, 1).to(query.dtype)
        drawn = []
        # scores, and the integers of one hash per key
        for part in chunks(tiles, problem.num_keys * (2 * query.shape[2] + 8)):
            free = keys_left(tiles, covered, left, part)
            weight = self._weights(query[:, part], k[:, : free.shape[2]], free)
            drawn.append(self._draw(weight, _noise(tiles, part, free.shape[2])))
        index, log_weight = (torch.cat(x, 1) for x in zip(*drawn, strict=True))
        return (key_runs(tiles, covered, index, log_weight),), covered

    def _weights(self, query: Tensor, k: Tensor, free: Tensor) -> Tensor:
        """Weight the keys of a chunk, ``[lists, chunk, seen]``; 0 for keys already taken, and positive for all others."""
        score = (query.flatten(1, 2) @ k.transpose(1, 2)).unflatten(1, query.shape[1:3])
        weight = torch.softmax(score.masked_fill_(~free[:, :, None], -torch.inf), -1)
        # queries and keys that are not finite count only in the uniform share
        weight = torch.nan_to_num_(weight, nan=0.0).amax(2)
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        even = self.uniform_share / free.sum(-1, keepdim=True).clamp(min=1).float()
        return ((1.0 - self.uniform_share) * weight + even) * free

    def _draw(self, weight: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the highest priorities: keys and log-weights, ``[lists, chunk, num]``."""
        priority = weight.double() / noise
        best, index = priority.topk(min(self.num + 1, priority.shape[2]), dim=-1)
        spare = self.num + 1 - best.shape[2]
        # if at most `num` keys remain the threshold is 0, and all keys have weight 1
        best, index = pad(best, (0, spare)), pad(index, (0, spare))
        own = weight.gather(2, index[..., :-1]).double()
        log_weight = (best[..., -1:] / own).log().clamp(min=0.0)
        return index[..., :-1], log_weight.masked_fill(own == 0, -torch.inf)


def _noise(tiles: Tiles, part: slice, seen: int) -> Tensor:
    """Draw a number above 0 for every key of every tile: ``[lists, chunk, seen]``."""
    problem, device = tiles.problem, tiles.problem.device
    head = problem.head_index[:, None, None]
    key = torch.arange(seen, dtype=torch.int64, device=device)
    noise = uniform((problem.seed, problem.layer, head, tiles.index[part, None], key, _STREAM), device) + 2.0**-33
    return noise.repeat(problem.k.shape[0], 1, 1)
