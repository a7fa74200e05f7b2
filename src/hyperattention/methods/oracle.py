"""The keys of largest weight for each query: a perfect choice of keys at a given budget."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.exact import grouped_scores
from hyperattention.kernels.list.operator import list_attention
from hyperattention.methods.base import AttentionMethod, Cost, exact_pairs
from hyperattention.methods.exact import Exact
from hyperattention.problem import Problem
from hyperattention.select.score.pooling import SCORE_BYTES
from hyperattention.select.stage import LookAhead
from hyperattention.transforms import refuse_transforms
from hyperattention.types import Partial, Runs, Selection


@dataclass(frozen=True)
class TopKeys(AttentionMethod):
    """Compute attention over the `num` keys with the largest scores of each query: an oracle, which scores all keys.

    listed_i = the num keys j with the largest q_i . k_j;   all others are dropped
    It is the upper limit for methods that drop keys. It saves no time, because it scores every key.
    Source: the top-k baseline of Desai et al., 2025 (arXiv:2510.05688), and of others.   Differs: attention sinks and window
    are not treated separately.
    Cost: all products of queries and keys, `num` slots per query, a bounded number of scores at a time.   Guarantee: the
    largest share of every row's weight that `num` keys can hold; exact if a row sees at most `num` keys.

    Args:
        num: number of keys of each query.

    Raises:
        ValueError: if `num` is not positive.

    Example:
        >>> TopKeys(256).cost(4096).selection_pairs
        2048.5
    """

    num: int

    def __post_init__(self) -> None:
        positive("TopKeys", num=self.num)

    @property
    def complete(self) -> bool:
        """False: all other keys are dropped."""
        return False

    @property
    def looks_ahead(self) -> LookAhead:
        """No row's list depends on later queries or keys."""
        return LookAhead.NOTHING

    def attend(self, problem: Problem) -> Partial:
        """Score a chunk of rows against all keys, keep the top `num`, compute attention over them."""
        if not problem.num_keys or not problem.q.numel():
            return Exact().attend(problem)
        refuse_transforms("attention by a method", problem.q, problem.k, problem.v)
        k, v, table = problem.storage()
        step = max(1, SCORE_BYTES // (4 * problem.q.shape[0] * problem.q.shape[1] * problem.num_keys))
        outs, lses = [], []
        for at in range(0, problem.num_queries, step):
            rows = slice(at, min(at + step, problem.num_queries))
            with torch.no_grad():
                selection = self._select(problem, rows)
            # tiles of one row: no two queries share a list
            q = problem.q[:, :, rows].flatten(0, 1)[:, :, None, None]
            out, lse = list_attention(q, k, v, selection, problem.scale, table)
            outs.append(out[:, :, 0, 0])
            lses.append(lse[:, :, 0, 0])
        shape = problem.q.shape[:2]
        return Partial(torch.cat(outs, 1).unflatten(0, shape), torch.cat(lses, 1).unflatten(0, shape))

    def _select(self, problem: Problem, rows: slice) -> Selection:
        (batch, kv_heads), group = problem.k.shape[:2], problem.group
        limit = _limit(problem, rows)
        # by position, which is known without reading from the device: ranks are no larger
        alike = problem.causal and problem.spans is None
        seen = min(problem.num_keys, max(1, problem.offset + rows.stop)) if alike else problem.num_keys
        wide = torch.promote_types(problem.q.dtype, torch.float32)
        q, k = problem.q[:, :, rows].to(wide).unflatten(1, (kv_heads, group)), problem.k[:, :, :seen].to(wide)
        hidden = torch.arange(seen, dtype=torch.int64, device=q.device) >= limit[:, None, None, :, None]
        score = grouped_scores(q, k, problem.scale).masked_fill_(hidden, -torch.inf)
        index = score.topk(min(self.num, seen), dim=-1)[1].flatten(0, 2)
        high = limit[:, None].expand(-1, kv_heads * group, -1).flatten(0, 1)
        lists = torch.arange(batch * kv_heads, dtype=torch.int64, device=q.device)
        # if a row sees fewer keys, the kernel skips listed keys beyond its limit
        runs = Runs(
            index, 1, torch.zeros(index.shape, dtype=torch.float32, device=q.device), low=torch.zeros_like(high), high=high
        )
        return Selection((runs,), row_limit=high[..., None], key_row=lists.repeat_interleave(group))

    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Return the cost for as many queries as keys, before running.

        Args:
            num_keys: length of the sequence.
            is_causal: whether queries see only earlier keys.
            head_dim: width of keys, and of values.

        Returns:
            the cost; selection scores as many pairs as exact attention.
        """
        exact = exact_pairs(num_keys, is_causal)
        memory_bytes = 8 * num_keys * head_dim * (self.num + 1)
        return Cost(float(self.num), exact, exact, memory_bytes, self.complete)


def _limit(problem: Problem, rows: slice) -> Tensor:
    """Count the leading keys that each row sees, ``[batch, rows]``."""
    position = problem.position[rows]
    end = position + 1 if problem.causal else torch.full_like(position, problem.num_keys)
    return problem.live_before(end).expand(problem.q.shape[0], -1)
