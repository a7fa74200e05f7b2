"""The certificate: an upper bound on a head's mean row error from a few fresh rows, valid at any confidence."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.error.audit import sample_rows
from hyperattention.error.exact_rows import exact_rows
from hyperattention.error.judge import relative_error
from hyperattention.error.tolerance.betting import STAKES, log_capital, mean_bound, split_errors
from hyperattention.exact import exact_attention
from hyperattention.problem import Problem

# rows of all heads of a group that are scored at a time
_BLOCK_ROWS = 64
# first counter of the rows, which no pilot, audit or draw shares
_STREAM = 0xCE27
# rows are chosen so that they cost what fewer would: a bound exceeds the mean by unseen / rows, and a rung that errs less by
# that costs so much more. Pairs are bought at a power of the error of about 1.2; a little less, because rows can be added
_PRICE = 0.8
# rows are added in batches, in units of those: a head far below the tolerance needs few, one just below it more
_BATCHES = (0.5, 0.5, 1.0)
# yet what rows not seen may hide takes no more than a third of the tolerance
_LEAST = 3


@dataclass(frozen=True)
class Certificate:
    """What the judged rows guarantee.

    Args:
        errors: errors of the rows judged.
        bounded: bound of the mean of min(e, 1), over rows that see anything.
        excess: mean of max(e - 1, 0) as the rows showed it: an estimate, which knows nothing of rows not drawn.
    """

    errors: Float[Tensor, "batch heads rows"]
    bounded: Float[Tensor, "batch heads"]
    excess: Float[Tensor, "batch heads"]

    @property
    def bound(self) -> Float[Tensor, "batch heads"]:
        """Add both: what is compared with a tolerance."""
        return self.bounded + self.excess


@dataclass(frozen=True)
class Aim:
    """What a certificate demands, so that others can foresee whether it will be given.

    Args:
        tolerance: the mean error allowed.
        chance: of a bound below the truth, for each head.
        num_queries: rows there are.
        live: share of them that see anything, which the mean is over.
    """

    tolerance: float
    chance: float
    num_queries: int
    live: Float[Tensor, "#batch 1"]

    def rows(self, pairs: int | float) -> int:
        """Choose how many rows to certify.

        With `unseen` rows' worth of wholly wrong ones that a sample without any cannot exclude, a rung that spends `pairs` a
        query needs price * unseen / (tolerance rows) more of them, and a row costs a pair a query, half of the keys at twice
        the time of a listed pair: together least at sqrt(price * unseen / tolerance * pairs). Rows are drawn for all batch
        entries alike, so where few see anything there must be more of them, for the entry with the fewest.

        Args:
            pairs: spent by the rung, a query.

        Returns:
            the number of rows, at most all.
        """
        unseen = -math.log(self.chance * STAKES[0]) / (self.tolerance * float(self.live.min()))
        return min(self.num_queries, math.ceil(max(_LEAST * unseen, math.sqrt(_PRICE * unseen * pairs))))

    def foresee(self, errors: Float[Tensor, "batch heads some"], rows: int) -> Bool[Tensor, "batch heads"]:
        """Return whether so many rows that err as these do would be certified."""
        whole, excess = split_errors(errors)
        left = self.tolerance * self.live - excess
        return log_capital(whole, left, weight=rows / max(1, errors.shape[-1])) >= -math.log(self.chance)

    def certificate(self, errors: Float[Tensor, "batch heads rows"], before: Certificate | None = None) -> Certificate:
        """Bound the mean error of all rows that see anything.

        Args:
            errors: errors of the rows judged.
            before: what the first of these rows guaranteed, if they were looked at before.

        Returns:
            the certificate, whose bounded part is the least of all looks.
        """
        whole, excess = split_errors(errors)
        bounded = mean_bound(whole, self.chance) / self.live
        # Ville's inequality covers all looks at once; an excess, once seen, stays seen
        bounded = bounded if before is None else torch.minimum(bounded, before.bounded)
        return Certificate(errors, bounded, excess / self.live)


@torch.no_grad()
def certify(
    problem: Problem, out: Float[Tensor, "batch heads queries value_dim"], aim: Aim, rows: int, attempt: int
) -> Certificate:
    """Judge an output on fresh rows, batch by batch, while more of them may still certify a kv head.

    All heads share the batches, so a head that is certified is looked at again as long as another is not.

    Args:
        problem: the problem.
        out: what is to be certified, as it will be returned.
        aim: what is demanded.
        rows: rows that are likely to be enough; half of them are tried first, twice as many at most.
        attempt: number of the attempt, which has rows of its own.

    Returns:
        the certificate of all rows judged.
    """
    most, seen, certificate = sum(math.ceil(part * rows) for part in _BATCHES), [], None
    for batch, part in enumerate(_BATCHES):
        index = fresh_rows(problem, math.ceil(part * rows), attempt, batch)
        seen.append(row_errors(out.index_select(2, index), exact_at(problem, index)))
        certificate = aim.certificate(torch.cat(seen, -1), certificate)
        enough = certificate.bound <= aim.tolerance
        passed, hoped = (of_group(x, problem.group) for x in (enough, enough | aim.foresee(certificate.errors, most)))
        if not (hoped & ~passed).any():
            break
    assert certificate is not None
    return certificate


def of_group(certified: Bool[Tensor, "batch heads"], group: int) -> Bool[Tensor, " kv_heads"]:
    """Return for which kv heads all query heads are certified, in all batch entries."""
    return certified.unflatten(1, (-1, group)).all(2).all(0)


def fresh_rows(problem: Problem, rows: int, attempt: int, batch: int = 0) -> Int[Tensor, " rows"]:
    """Draw rows to certify, one from each of equal strata; every attempt and batch has its own.

    Nothing else enters but the problem's seed and layer: calls alike in both are judged on the same rows.

    Args:
        problem: whose rows.
        rows: strata.
        attempt: number of the attempt.
        batch: number of the batch.

    Returns:
        indices in order.
    """
    return sample_rows(problem.num_queries, rows, problem.seed, problem.device, (_STREAM, problem.layer, attempt, batch))


def visible_to(problem: Problem, index: Int[Tensor, " rows"]) -> Int[Tensor, "#batch rows"]:
    """Count the live keys that each of some queries may see."""
    position = problem.position[index]
    return problem.live_before(position + 1 if problem.causal else torch.full_like(position, problem.num_keys))


def exact_at(problem: Problem, index: Int[Tensor, " rows"]) -> Float[Tensor, "batch heads rows value_dim"]:
    """Compute some rows exactly, in float32 at least; 0 where a row sees nothing.

    Args:
        problem: whose rows.
        index: which, in order.

    Returns:
        the rows.
    """
    # on a CPU a block of causal rows is scored against the keys that its last row sees: in small blocks that is little more
    size = max(1, _BLOCK_ROWS // problem.group) if problem.causal and problem.device.type == "cpu" else max(1, len(index))
    return torch.cat([_exact_block(problem, block) for block in index.split(size)], 2)


def _exact_block(problem: Problem, index: Tensor) -> Tensor:
    rows, visible = problem.q.index_select(2, index), visible_to(problem, index)
    if problem.rank is None:
        return exact_rows(rows, problem.k, problem.v, visible[0], problem.scale)
    return exact_attention(rows, problem.k, problem.v, scale=problem.scale, visible=visible).out


def row_errors(
    rows: Float[Tensor, "batch heads rows value_dim"], exact: Float[Tensor, "batch heads rows value_dim"]
) -> Float[Tensor, "batch heads rows"]:
    """Relate each row's error to the exact row; 0 where both are 0, as in rows that see nothing."""
    return relative_error(rows.to(exact.dtype) - exact, exact)
