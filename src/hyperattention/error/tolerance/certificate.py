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
# The number of rows balances two costs: rows, and a rung with a smaller error, because a bound exceeds the mean by unseen /
# rows. The pairs of a rung grow like error^-1.2; a smaller power is used here, because rows can be added later
_PRICE = 0.8
# rows are added in batches, in units of those: a head far below the tolerance needs few rows, a head just below it more
_BATCHES = (0.5, 0.5, 1.0)
# the allowance for unsampled rows is at most a third of the tolerance
_LEAST = 3


@dataclass(frozen=True)
class Certificate:
    """The guarantee that the certifying rows give.

    Args:
        errors: errors of the rows drawn.
        bounded: bound of the mean of min(e, 1), over rows that see at least one key.
        excess: mean of max(e - 1, 0) over the rows drawn: an estimate, which does not cover rows not drawn.
    """

    errors: Float[Tensor, "batch heads rows"]
    bounded: Float[Tensor, "batch heads"]
    excess: Float[Tensor, "batch heads"]

    @property
    def bound(self) -> Float[Tensor, "batch heads"]:
        """The sum of both, which is compared with the tolerance."""
        return self.bounded + self.excess


@dataclass(frozen=True)
class Aim:
    """The requirements of a certificate, so that the pilot can predict whether a rung will pass.

    Args:
        tolerance: the mean error allowed.
        chance: probability of a bound below the true mean, for each head.
        num_queries: number of all rows.
        live: share of the rows that see at least one key; the mean is over these.
    """

    tolerance: float
    chance: float
    num_queries: int
    live: Float[Tensor, "#batch 1"]

    def rows(self, pairs: int | float) -> int:
        """Choose how many rows to certify.

        A sample without wrong rows cannot exclude `unseen` / rows of completely wrong rows. To compensate, a rung that
        spends `pairs` per query needs more of them, by a factor of 1 + price * unseen / (tolerance rows). A row costs one
        pair per query (half of the keys, at twice the time of a listed pair). The total is smallest at sqrt(price * unseen /
        tolerance * pairs) rows. All batch entries share the rows, so if few rows see a key, more are drawn, for the entry
        with the fewest.

        Args:
            pairs: pairs that the rung spends per query.

        Returns:
            the number of rows, at most all.
        """
        unseen = -math.log(self.chance * STAKES[0]) / (self.tolerance * float(self.live.min()))
        return min(self.num_queries, math.ceil(max(_LEAST * unseen, math.sqrt(_PRICE * unseen * pairs))))

    def foresee(self, errors: Float[Tensor, "batch heads some"], rows: int) -> Bool[Tensor, "batch heads"]:
        """Return whether `rows` rows with errors like these would be certified."""
        whole, excess = split_errors(errors)
        left = self.tolerance * self.live - excess
        return log_capital(whole, left, weight=rows / max(1, errors.shape[-1])) >= -math.log(self.chance)

    def certificate(self, errors: Float[Tensor, "batch heads rows"], before: Certificate | None = None) -> Certificate:
        """Bound the mean error of all rows that see at least one key.

        Args:
            errors: errors of the rows drawn.
            before: certificate of the first of these rows, if they were evaluated before.

        Returns:
            the certificate; its bounded part is the smallest of all looks.
        """
        whole, excess = split_errors(errors)
        bounded = mean_bound(whole, self.chance) / self.live
        # Ville's inequality covers all looks at once; the excess includes every row drawn so far
        bounded = bounded if before is None else torch.minimum(bounded, before.bounded)
        return Certificate(errors, bounded, excess / self.live)


@torch.no_grad()
def certify(
    problem: Problem, out: Float[Tensor, "batch heads queries value_dim"], aim: Aim, rows: int, attempt: int
) -> Certificate:
    """Certify an output on fresh rows, batch by batch, as long as more rows may still certify a kv head.

    All heads share the batches, so a certified head is evaluated again as long as another head is not certified.

    Args:
        problem: the problem.
        out: the output to certify, as it will be returned.
        aim: requirements of the certificate.
        rows: number of rows that is likely to suffice; half of them are tried first, at most twice as many in total.
        attempt: number of the attempt; each attempt has its own rows.

    Returns:
        the certificate of all rows drawn.
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
    """Draw rows to certify, one from each of equal strata; every attempt and batch has its own rows.

    Besides that, only the problem's seed and layer matter: calls with equal seed and layer are certified on the same rows.

    Args:
        problem: the problem.
        rows: number of strata.
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
    """Compute some rows exactly, in float32 at least; 0 for a row that sees no key.

    Args:
        problem: the problem.
        index: the rows, in order.

    Returns:
        the rows.
    """
    # on a CPU a block of causal rows is scored against the keys that its last row sees: in small blocks the extra cost is
    # small
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
    """Return each row's error relative to the exact row; 0 if both are 0, as in rows that see no key."""
    return relative_error(rows.to(exact.dtype) - exact, exact)
