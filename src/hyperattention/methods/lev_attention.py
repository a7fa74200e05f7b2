"""LevAttention: weights |q . k|^p over one set of keys for all queries, those of the largest sensitivities."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hyperattention.check import positive
from hyperattention.kernels.power_rows import power_rows
from hyperattention.methods.base import AttentionMethod, Cost, exact_pairs
from hyperattention.methods.exact import Exact
from hyperattention.problem import Problem
from hyperattention.select.stage import LookAhead
from hyperattention.sensitivity.bounds import sensitivity_bounds, sum_of_bounds
from hyperattention.sensitivity.key_rows import finite_rows
from hyperattention.sensitivity.lewis import check_power
from hyperattention.sensitivity.online import online_leverage
from hyperattention.sensitivity.universal import at_least, candidates, in_set, largest, running_sets
from hyperattention.transforms import refuse_transforms
from hyperattention.types import Partial

# rows of a chunk whose rows have sets of their own, and keys between two stored sets
_TILE = 128
# scores of one chunk of rows
_SCORES = 4 * 2**20


@dataclass(frozen=True)
class LevAttention(AttentionMethod):
    """Attention with weights |q . k|^p, normalised over a universal set U of keys: those with the largest sensitivities.

    out_i = sum_{j in U} |q_i . k_j|^p v_j / sum_{j in U} |q_i . k_j|^p,   over the keys of U that row i sees
    s_j = max_y |k_j . y|^p / sum_l |k_l . y|^p,   U = the `num` keys of the largest s_j, or all with s_j >= epsilon
    No softmax is involved: `lse` is the log of the sum of |scale q . k|^p, and an audit, which compares with softmax
    attention, measures the difference of two functions. For softmax over such a set use Method(select.UniversalSet(num)).

    Source: Kannan et al., 2024 (arXiv:2410.05462).   Differs: s_j is bounded by leverage scores for p = 2 (equal to s_j), by
    those of tensor powers for other even p, by Lewis weights for any other p; causal rows see the keys of U at or before
    them; `online`; keys are neither centred nor given a ridge.
    Cost: `num` pairs per query; selection: 2 head_dim products per key for p = 2.
    Guarantee: with `epsilon`, without causality, each entry >= epsilon of the full matrix |q . k|^p / sum is in U, for every
    query, and |U| is at most head_dim / epsilon for p <= 2, and head_dim^{p/2} / epsilon for p > 2 (see `sum_of_bounds`).
    With `online`, row i has the keys of the largest online scores among those that it sees; a key with an entry >= epsilon
    in a causal row has an online score >= epsilon, up to the ridge. Exact, for weights |q . k|^p, if `num` covers all keys;
    with `online`, for every row that sees at most `num` keys.
    Bad values: a NaN or infinite key is left out of all scores and is in U first, so rows that see it are NaN, as in exact
    attention. A row whose keys in U all have weight 0 gets output 0, lse -inf and no gradient. Keys that span few dimensions
    need no ridge. A NaN value reaches all rows of a causal call, because 0 times NaN is NaN.

    Args:
        num: number of keys in U; None if `epsilon` is given.
        p: the exponent, at least 1.
        epsilon: U is all keys whose sensitivity may be at least this, as many as there are; the host reads how many.
        online: whether a key is scored by itself and the keys before it, so that causal rows do not look ahead; p = 2 only.

    Raises:
        ValueError: if not exactly one of `num` and `epsilon` is given, one is out of range, p is below 1 or infinite, or
            `online` is combined with another p than 2 or with `epsilon`.

    Example:
        >>> LevAttention(32).cost(4096).pairs
        32.0
    """

    num: int | None = None
    p: float | int = 2
    epsilon: float | None = None
    online: bool = False

    def __post_init__(self) -> None:
        """Check the arguments against each other."""
        if (self.num is None) == (self.epsilon is None):
            raise ValueError(f"{self!r}: give either num, the number of keys, or epsilon, the least sensitivity")
        if self.num is not None:
            positive("LevAttention", num=self.num)
        if self.epsilon is not None and not 0 < self.epsilon < 1:
            raise ValueError(f"{self!r}: epsilon must lie between 0 and 1; it is a share of a row's weight")
        check_power("LevAttention", self.p)
        if self.online and (self.p != 2 or self.epsilon is not None):
            raise ValueError(f"{self!r}: online scores are leverage scores, for p=2, and need num; leave online out")

    @property
    def complete(self) -> bool:
        """False: keys outside U are dropped."""
        return False

    @property
    def looks_ahead(self) -> LookAhead:
        """The set depends on all keys, unless keys are scored online."""
        return LookAhead.NOTHING if self.online else LookAhead.SEQUENCE

    def attend(self, problem: Problem) -> Partial:
        """Choose U without gradients, and average values over it.

        Args:
            problem: the problem.

        Returns:
            rows and the logs of their sums of weights, float32 (float64 for float64 input).
        """
        if not problem.num_keys or not problem.q.numel():
            return Exact().attend(problem)
        refuse_transforms("attention by a method", problem.q, problem.k, problem.v)
        limit = self._limit(problem)
        if self.online and problem.causal:
            return self._attend_running(problem, limit)
        index = self.universal_set(problem)
        k, v = _taken(problem, index)
        step = max(1, _SCORES // max(1, problem.q.shape[0] * problem.q.shape[1] * index.shape[2]))
        parts = []
        for begin in range(0, problem.num_queries, step):
            rows = slice(begin, begin + step)
            hidden = index[:, :, None, None] >= limit[:, None, None, rows, None]
            parts.append(self._rows(problem, rows, k, v, hidden, whole=step >= problem.num_queries))
        return _joined(parts)

    @torch.no_grad()
    def universal_set(self, problem: Problem) -> Int[Tensor, "batch kv_heads num"]:
        """Choose the keys of U by all keys of the problem.

        Args:
            problem: the problem; its queries are not read.

        Returns:
            ascending ranks of keys; the number of keys marks an empty place.
        """
        k, total = problem.k.flatten(0, 1), _total(problem)
        score = online_leverage(k, total) if self.online else sensitivity_bounds(k, total, power=self.p)
        score = _first(score, k)
        if self.num is not None:
            return largest(score, self.num, total).unflatten(0, problem.k.shape[:2])
        assert self.epsilon is not None  # checked when it was made
        return at_least(score, self.epsilon, total).unflatten(0, problem.k.shape[:2])

    def _attend_running(self, problem: Problem, limit: Tensor) -> Partial:
        """Give each row the largest online scores among the keys that it sees."""
        (batch, kv_heads), keys = problem.k.shape[:2], problem.num_keys
        num = min(self.num or keys, keys)
        with torch.no_grad():
            k, total = problem.k.flatten(0, 1), _total(problem)
            dead = torch.arange(keys, dtype=torch.int64, device=k.device) >= total
            score = _first(online_leverage(k, total), k).masked_fill(dead, -torch.inf)
            sets = running_sets(score, num, _TILE)
        step = _TILE if problem.spans is None else min(_TILE, problem.spans[0])
        if problem.spans is not None and problem.spans[0] % step:
            step = problem.spans[0]
        parts = []
        for begin in range(0, problem.num_queries, step):
            rows = slice(begin, begin + step)
            seen = limit[:, None, rows].expand(batch, kv_heads, -1).flatten(0, 1)  # [lists, rows]
            with torch.no_grad():
                index = candidates(sets, seen[:, :1], _TILE, step, keys)
                hidden = ~in_set(score, index, seen, num)
            index, hidden = (x.unflatten(0, (batch, kv_heads)) for x in (index, hidden))
            k, v = _taken(problem, index)
            parts.append(self._rows(problem, rows, k, v, hidden[:, :, None], whole=step >= problem.num_queries))
        return _joined(parts)

    def _rows(self, problem: Problem, rows: slice, k: Tensor, v: Tensor, hidden: Tensor, *, whole: bool) -> Partial:
        """Attend a chunk of rows; its weights are computed again for gradients, unless it is the only chunk."""
        q = problem.q[:, :, rows].to(k.dtype).unflatten(1, (problem.k.shape[1], problem.group))
        arguments = (q, k, v, hidden, problem.scale, float(self.p))
        if whole or not torch.is_grad_enabled():
            out, lse = power_rows(*arguments)
        else:
            out, lse = checkpoint(power_rows, *arguments, use_reentrant=False, preserve_rng_state=False)
        return Partial(out.flatten(1, 2), lse.flatten(1, 2))

    def _limit(self, problem: Problem) -> Tensor:
        """Count the leading live keys that each row sees, ``[batch, queries]``."""
        end = problem.position + 1 if problem.causal else torch.full_like(problem.position, problem.num_keys)
        return problem.live_before(end).expand(problem.q.shape[0], -1)

    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Return the cost for as many queries as keys, before running.

        Args:
            num_keys: length of the sequence.
            is_causal: whether queries see only earlier keys.
            head_dim: width of keys, and of values.

        Returns:
            the cost; with `epsilon`, of the largest set that the guarantee allows.
        """
        most = sum_of_bounds(head_dim, self.p) / self.epsilon if self.epsilon else float(self.num or 0)
        running = self.online and is_causal
        pairs = float(self.num or 0) + 2 * _TILE if running else min(float(num_keys), most) if self.epsilon else most
        chunks = -(-num_keys // _TILE) if running else 1
        memory_bytes = 4 * head_dim * (2 * num_keys + 2 * int(pairs) * chunks)
        return Cost(pairs, self._products(head_dim), exact_pairs(num_keys, is_causal), memory_bytes, False)

    def _products(self, head_dim: int) -> float:
        """Count products of head_dim numbers spent on the score of a key: Gram matrix, and factor."""
        if self.p == 2:
            return 2.0 * head_dim
        if self.p % 2 == 0:
            return 2.0 * math.comb(head_dim + int(self.p) // 2 - 1, int(self.p) // 2) ** 2 / head_dim
        return 2.0 * head_dim * 22


def _total(problem: Problem) -> Tensor:
    """Count the live keys of each list, ``[lists, 1]``."""
    end = torch.full((1,), problem.num_keys, dtype=torch.int64, device=problem.device)
    live = problem.live_before(end).expand(problem.k.shape[0], 1)
    return live.repeat_interleave(problem.k.shape[1], 0)


def _first(score: Tensor, k: Tensor) -> Tensor:
    """Put keys that are not finite, and scores that overflowed, before all others."""
    return torch.nan_to_num(score, nan=torch.inf, posinf=torch.inf).masked_fill(~finite_rows(k), torch.inf)


def _taken(problem: Problem, index: Tensor) -> tuple[Tensor, Tensor]:
    """Copy keys and values, in the accumulation dtype; zeros for empty places."""
    empty = (index == problem.num_keys)[..., None]
    place = index.clamp(max=problem.num_keys - 1)[..., None]
    dtype = torch.promote_types(problem.q.dtype, torch.float32)
    k, v = (
        x.gather(2, place.expand(-1, -1, -1, x.shape[3])).to(dtype).masked_fill(empty, 0.0) for x in (problem.k, problem.v)
    )
    return k, v


def _joined(parts: list[Partial]) -> Partial:
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([part.out for part in parts], 2), torch.cat([part.lse for part in parts], 2))
