"""Published algorithms, built from stages."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperattention.check import positive
from hyperattention.merge import merge
from hyperattention.methods.base import AttentionMethod, Cost, exact_pairs, refuse_spans
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.problem import Problem, compact
from hyperattention.select.draw import Draw
from hyperattention.select.locate.hash_buckets import HashBuckets
from hyperattention.select.score.value_norm import ValueNorm
from hyperattention.select.stage import LookAhead
from hyperattention.transforms import refuse_transforms
from hyperattention.types import Partial

# queries that share one sample: many, as in the paper, yet few enough that their scores fit in memory at any length
SAMPLE_TILE = 2048
# layers of one model: blocks of the recursion draw as layers of their own, beyond these
LAYERS = 2**24


@dataclass(frozen=True)
class HyperAttention(AttentionMethod):
    """Run HyperAttention as published, with its own parameters: blocks of a hash order, and one sample of the other keys.

    Without a causal mask: exact attention within buckets of queries and keys with equal hashes, merged with keys that are
    sampled from the rest and weighted so that both sums are unbiased. With a causal mask: the sequence is halved; each half
    is computed by recursion, and the later queries attend to the earlier keys without a mask; short parts use exact
    attention.

    Source: Han et al., 2023 (arXiv:2310.05869), Alg. 1 to 4, and the parameters of its published code.   Differs:

    - buckets follow the Gray order; the published code sorts by Gray(code), where the order is its inverse;
    - queries and keys are centred before hashing, and every kv head has its own projections;
    - a sampled key in the query's own bucket is skipped; one of the published paths counts it twice;
    - keys are sampled by ||v||^2 mixed with a uniform share, stratified, and one sample serves both sums, where Alg. 2 and 3
      draw separately and the published code draws only uniformly; each 2048 queries share one sample, where the paper has
      one for all; weights are those of the sample (no cap and no kappa, as in the published code; see `ApproxD` for Alg. 2);
    - padding has no effect: bucket sizes differ by at most one key, lengths may be odd or unequal, masked keys are left out;
      in the published code, zero padding adds exp(0) to denominators;
    - lse carries its gradient, so that backward is the gradient of forward; in the published code lse is detached;
    - queries and keys may differ in number, stand at any offset, and share kv heads.

    Cost: about `block_size` + `sample_size` slots per query; if causal, times log2(n / min_seq_len) / 2, plus the exact
    parts.
    Guarantee: numerator and denominator unbiased; the paper's spectral bound under its assumptions on alpha and kappa.

    Args:
        block_size: most keys in a bucket.
        sample_size: keys sampled from the rest.
        bits: random hyperplanes of the hash.
        min_seq_len: a causal part of at most this many positions, or a block of fewer queries, uses exact attention.

    Raises:
        ValueError: if a size is not positive, or there are too many bits.

    Example:
        >>> HyperAttention(block_size=64)
        HyperAttention(block_size=64, sample_size=256, bits=7, min_seq_len=4096)
    """

    block_size: int = 256
    sample_size: int = 256
    bits: int = 7
    min_seq_len: int = 4096

    def __post_init__(self) -> None:
        """Check the sizes."""
        sizes = {"block_size": self.block_size, "sample_size": self.sample_size, "min_seq_len": self.min_seq_len}
        positive("HyperAttention", **sizes)
        HashBuckets(self.block_size, bits=self.bits)

    @property
    def complete(self) -> bool:
        """True: every key is in the bucket or represented by the sample."""
        return True

    @property
    def looks_ahead(self) -> LookAhead:
        """Entire blocks are sorted, and the positions of the halves depend on the length of the sequence."""
        return LookAhead.SEQUENCE

    def block_method(self, num_queries: int) -> Method:
        """Return the stages that run if `num_queries` queries, `min_seq_len` or more, see all keys."""
        buckets, sample = HashBuckets(self.block_size, bits=self.bits), Draw(self.sample_size, by=ValueNorm(power=2))
        return Method(buckets, sample, tile=max(1, min(num_queries, SAMPLE_TILE)))

    def attend(self, problem: Problem) -> Partial:
        """Run the recursion, or a single block without a causal mask."""
        refuse_spans(self, problem)
        refuse_transforms("attention by a method", problem.q, problem.k, problem.v)
        if not problem.causal:
            return _in_dtype(self._block(problem), problem)
        end = problem.offset + problem.num_queries
        rows = self._causal(problem, _live_positions(problem), 0, end) if end > 0 else _nothing(problem, problem.num_queries)
        before = problem.num_queries - rows.lse.shape[2]
        return _in_dtype(_join(_nothing(problem, before), rows) if before else rows, problem)

    def _block(self, problem: Problem) -> Partial:
        few = problem.num_queries < self.min_seq_len
        return (Exact() if few else self.block_method(problem.num_queries)).attend(problem)

    def _causal(self, problem: Problem, live: Tensor | None, begin: int, end: int) -> Partial:
        """Compute attention between the queries and keys at positions `begin` to `end`."""
        if end - begin <= self.min_seq_len:
            return Exact().attend(_part(problem, live, (begin, end), (begin, end), causal=True))
        middle = begin + (end - begin + 1) // 2
        rows = self._causal(problem, live, middle, end)
        if rows.lse.shape[2]:
            # no two blocks have the same middle, so the middle is the counter of their draws
            block = _part(problem, live, (middle, end), (begin, middle), causal=False)
            rows = merge((rows, self._block(replace(block, layer=problem.layer + LAYERS * middle))))
        if middle <= problem.offset:
            return rows
        return _join(self._causal(problem, live, begin, middle), rows)

    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Return the cost for as many queries as keys, before running.

        Args:
            num_keys: length of the sequence.
            is_causal: whether queries see only earlier keys.
            head_dim: width of keys, and of values.

        Returns:
            the cost, averaged over the queries of the recursion.
        """
        blocks = list(self._blocks(num_keys)) if is_causal else [(num_keys, num_keys)]
        pairs, chosen, read = 0.0, 0.0, 0.0
        if is_causal:
            pairs = sum(count * (count + 1) / 2 for count in self._leaves(num_keys))
            read = float(num_keys)
        for queries, keys in blocks:
            hashed = queries >= self.min_seq_len
            pairs += queries * (self.block_size + self.sample_size if hashed else keys)
            # a projection of every query and key, and the norm of every value
            chosen += self.bits * (queries + keys) + keys if hashed else 0
            read += keys + (self.sample_size * -(-queries // SAMPLE_TILE) if hashed else 0)
        memory_bytes = int(4 * head_dim * (2 * read + 2 * num_keys))
        count = max(1, num_keys)
        return Cost(pairs / count, chosen / count, exact_pairs(num_keys, is_causal), memory_bytes, True)

    def _leaves(self, count: int) -> list[int]:
        if count <= self.min_seq_len:
            return [count]
        return self._leaves(count - count // 2) + self._leaves(count // 2)

    def _blocks(self, count: int) -> list[tuple[int, int]]:
        """Queries and keys of every block off the diagonal of a causal sequence."""
        if count <= self.min_seq_len:
            return []
        keys, queries = count - count // 2, count // 2
        return [(queries, keys), *self._blocks(keys), *self._blocks(queries)]


def _live_positions(problem: Problem) -> Tensor | None:
    """Return which positions hold a live key, ``[batch, keys]``; None if all do."""
    if problem.rank is None:
        return None
    return problem.rank.diff(dim=1, prepend=torch.zeros_like(problem.rank[:, :1])) > 0


def _part(
    problem: Problem, live: Tensor | None, queries: tuple[int, int], keys: tuple[int, int], *, causal: bool
) -> Problem:
    """Cut out the queries and the keys at some positions."""
    first, last = (max(0, at - problem.offset) for at in queries)
    begin, end = (min(at, problem.num_keys) for at in keys)
    q, k, v, rank = problem.q[:, :, first:last], problem.k, problem.v, None
    if problem.rank is None or live is None:
        k, v = k[:, :, begin:end], v[:, :, begin:end]
    else:
        # keys are in order of rank; put those of the part back at their positions, so that each row drops its own masked
        # keys
        index = (problem.rank[:, begin:end] - 1).clamp(min=0)[:, None, :, None]
        k, v = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
        k, v, rank = compact(k, v, live[:, begin:end])
    offset = max(problem.offset, queries[0]) - keys[0] if causal else 0
    return replace(problem, q=q, k=k, v=v, rank=rank, causal=causal, offset=offset)


def _nothing(problem: Problem, count: int) -> Partial:
    """Return rows that see no key."""
    shape = (*problem.q.shape[:2], count)
    lse = problem.q.new_full(shape, -torch.inf, dtype=torch.promote_types(problem.q.dtype, torch.float32))
    return Partial(problem.q.new_zeros(*shape, problem.v.shape[3]), lse)


def _join(earlier: Partial, later: Partial) -> Partial:
    return Partial(torch.cat((earlier.out, later.out), 2), torch.cat((earlier.lse, later.lse), 2))


def _in_dtype(partial: Partial, problem: Problem) -> Partial:
    return Partial(partial.out.to(problem.q.dtype), partial.lse)
