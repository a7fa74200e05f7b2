"""Uniform draws; their number is chosen for a wanted error of the denominator."""

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.random import uniform
from hyperattention.select.density import Even
from hyperattention.select.score.keys_left import key_runs
from hyperattention.select.score.pooling import chunks, edges, pool_queries
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage
from hyperattention.tiling import Tiles
from hyperattention.types import Runs

# extra counters after the five of every draw, so that the pilot, the draws and other draws share no bits
_PILOT, _STREAM = 4, 5


@dataclass(frozen=True)
class BudgetedDraw(Stage):
    """Draw uniformly from the remaining keys, for each tile as few as keep the error of every denominator below `epsilon`.

    b = (z sigma N / (epsilon D))^2,   z = Phi^-1(1 - delta / 2),   sigma and D of exp(q_i . k_j) from a pilot of the N keys
    left, D with the exact part of earlier stages; the largest b of the tile's pooled queries, within `pilot` and `num`
    Source: Desai et al., 2025 (arXiv:2510.05688), vAttention, the budget of the denominator by the central limit theorem.
    Differs: one budget per tile, by the worst of its pooled queries, where the paper has one per query; the pilot is drawn
    separately and not listed, so that the draws are unbiased for every number of draws; draws are stratified, which only
    lowers their variance; at most `num` draws, so that budgets can be compared. The paper's exact part is Sinks, Window and
    TopBlocks.
    Cost: `num` slots per query (unused ones are empty), and `pooled` products with the pilot and with all keys listed
    before.
    Guarantee: E[sum of weights of a key] = 1 for every remaining key; the error bound is approximate, because of the normal
    approximation, the pooled queries and the limit `num`.

    Args:
        num: largest number of keys drawn for each tile.
        pilot: number of keys of the pilot, and smallest number of keys drawn.
        epsilon: wanted relative error of the denominator.
        delta: probability of a larger error.
        pooled: averaged queries per tile and head.

    Raises:
        ValueError: if a number is not positive, the pilot is a single key, or a share is not between 0 and 1.
    """

    num: int
    pilot: int = 64
    epsilon: float = 0.05
    delta: float = 0.05
    pooled: int = 4

    def __post_init__(self) -> None:
        positive("BudgetedDraw", num=self.num, pilot=self.pilot, pooled=self.pooled)
        if self.pilot < 2:
            raise ValueError(f"BudgetedDraw(pilot={self.pilot}): a standard deviation needs at least 2 keys")
        for name, share in (("epsilon", self.epsilon), ("delta", self.delta)):
            if not 0.0 < share < 1.0:
                raise ValueError(f"BudgetedDraw({name}={share!r}): {name} must lie between 0 and 1")

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
        """The number of draws of a tile depends on all of its queries."""
        return LookAhead.TILE

    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile, empty slots included."""
        return self.num

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count products of pooled queries with the pilot, per query; those with keys of earlier stages are not counted."""
        return min(self.pooled, tile) / tile * self.pilot

    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Find the number of draws of every tile, and draw."""
        problem = tiles.problem
        if not problem.k.shape[0] * problem.num_keys * len(tiles.index):
            return (), covered
        begin, hole_begin, hole_end, end = edges(tiles, covered)
        even = Even((begin, hole_begin, hole_end, end))
        query = pool_queries(tiles, self.pooled, problem.scale)
        pilot = even.at(_points(tiles, self.pilot, _PILOT)).clamp(0, problem.num_keys - 1)
        counted = torch.ones_like(pilot, dtype=torch.bool) if not covered.blocks else ~covered.holds(pilot)
        before, exact = _exact_part(tiles, covered)
        numbers = (self.pilot + before.shape[2]) * (problem.k.shape[3] + 3 * query.shape[2])
        budget = []
        for part in chunks(tiles, numbers):
            # draws in blocks taken by earlier stages count as 0, in the pilot as in the draws
            inside = _scores(query[:, part], problem.k, pilot[:, part], counted[:, part])
            outside = _scores(query[:, part], problem.k, before[:, part], exact[:, part])
            budget.append(self._budget(inside, outside, even.count[:, part]))
        few, slot = even.count <= self.num, torch.arange(self.num, dtype=torch.int64, device=problem.device)
        number = torch.where(few, even.count, torch.cat(budget, 1))
        noise = uniform((*_counters(tiles), slot, _STREAM), problem.device).repeat(problem.k.shape[0], 1, 1)
        point = (slot + torch.where(few, 0.5, noise)) / number.clamp(min=1)
        log_weight = (even.count.float() / number.clamp(min=1)).log().masked_fill(slot >= number, -torch.inf)
        index = even.at(point.clamp(max=1.0)).clamp(0, problem.num_keys - 1)
        return (key_runs(tiles, covered, index, log_weight),), covered

    def _budget(self, inside: Tensor, outside: Tensor, count: Tensor) -> Tensor:
        """Find the number of draws: ``[lists, chunk, 1]``, from scores of the pilot and of the exact part."""
        top = torch.cat([inside, outside], -1).amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0.0)
        sampled, exact = (inside - top).exp(), (outside - top).exp().sum(-1)
        denominator = exact + count * sampled.mean(-1)
        spread = NormalDist().inv_cdf(1.0 - self.delta / 2) * sampled.std(-1) * count
        needed = (spread / (self.epsilon * denominator)).square().ceil()
        # a value that is not finite gives no information: use all draws
        needed = torch.nan_to_num(needed, nan=self.num, posinf=self.num).amax(-1, keepdim=True)
        return needed.clamp(min(self.pilot, self.num), self.num).long()


def _counters(tiles: Tiles) -> tuple[int | Tensor, ...]:
    """Return all counters of a tile's draws except the slot: ``[kv_heads, tiles, 1]``."""
    problem = tiles.problem
    head = problem.head_index[:, None, None]
    return problem.seed, problem.layer, head, tiles.index[:, None]


def _points(tiles: Tiles, num: int, stream: int) -> Tensor:
    """Draw one point from each of `num` equal strata of [0, 1): ``[lists, tiles, num]``."""
    slot = torch.arange(num, dtype=torch.int64, device=tiles.problem.device)
    noise = uniform((*_counters(tiles), slot, stream), tiles.problem.device)
    return ((slot + noise) / num).repeat(tiles.problem.k.shape[0], 1, 1)


def _exact_part(tiles: Tiles, covered: CoveredKeys) -> tuple[Tensor, Tensor]:
    """Return the keys that earlier stages took: ``[lists, tiles, keys]``, and which of those slots count."""
    problem, end = tiles.problem, tiles.by_list(tiles.visible_end)[..., None]
    device, shape = problem.device, (*end.shape[:2], -1)
    prefix = torch.arange(covered.prefix, dtype=torch.int64, device=device).expand(shape)
    index, live = [prefix], [prefix < end]
    if covered.gap is not None:
        low, high = (tiles.by_list(x)[..., None] for x in covered.gap)
        # at most `placed` of the keys taken by position lie in the window
        index.append(low + torch.arange(covered.placed, dtype=torch.int64, device=device))
        live.append((index[-1] >= covered.prefix) & (index[-1] < torch.minimum(high, end)))
    for block, size in covered.blocks:
        index.append((block[..., None] * size + torch.arange(size, dtype=torch.int64, device=device)).flatten(2))
        begin, hole_begin, hole_end, _ = edges(tiles, covered)
        hole = (index[-1] >= hole_begin) & (index[-1] < hole_end)
        live.append((index[-1] >= begin) & (index[-1] < end) & ~hole)
    return torch.cat(index, 2).clamp(0, problem.num_keys - 1), torch.cat(live, 2)


def _scores(query: Tensor, k: Tensor, index: Tensor, live: Tensor) -> Tensor:
    """Score listed keys for pooled queries: ``[lists, chunk, pooled, keys]``; -inf if a slot does not count."""
    lists, num_keys = index.shape[0], k.shape[2]
    row = index + torch.arange(lists, dtype=torch.int64, device=k.device)[:, None, None] * num_keys
    keys = k.flatten(0, 2).index_select(0, row.flatten()).view(*index.shape, k.shape[3]).to(query.dtype)
    return (query @ keys.transpose(2, 3)).masked_fill(~live[:, :, None], -torch.inf)
