"""The certificate: an upper bound on a head's mean row error from a few fresh rows, valid at any confidence."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.audit import sample_rows
from hyperattention.exact import exact_attention
from hyperattention.exact_rows import exact_rows
from hyperattention.interval import WRONG_ROW
from hyperattention.judge import relative_error
from hyperattention.problem import Problem

# shares of the largest bet allowed, and how the capital is divided among them. The largest is best for rows of like error,
# and alone decides where no row errs; the others are for a few wholly wrong rows
_BETS = (1.0, 0.75, 0.5, 0.25)
_STAKES = (0.4, 0.2, 0.2, 0.2)
# halvings of the interval in which the bound lies: double precision has no more
_HALVINGS = 30
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
        the time of a listed pair: together least at sqrt(price * unseen / tolerance * pairs).

        Args:
            pairs: spent by the rung, a query.

        Returns:
            the number of rows, at most all.
        """
        unseen = -math.log(self.chance * _STAKES[0]) / self.tolerance
        return min(self.num_queries, math.ceil(max(_LEAST * unseen, math.sqrt(_PRICE * unseen * pairs))))

    def foresee(self, errors: Float[Tensor, "batch heads some"], rows: int) -> Bool[Tensor, "batch heads"]:
        """Tell whether so many rows that err as these do would be certified."""
        whole, excess = _split(errors)
        left = self.tolerance * self.live - excess
        return log_capital(whole, left, weight=rows / max(1, errors.shape[-1])) >= -math.log(self.chance)

    def bound(self, errors: Float[Tensor, "batch heads rows"]) -> Float[Tensor, "batch heads"]:
        """Bound the mean error of all rows that see anything."""
        return mean_bound(errors, self.chance) / self.live


def log_capital(
    errors: Float[Tensor, "*head rows"], mean: Float[Tensor, "*#head"], weight: float = 1.0
) -> Float[Tensor, "*head"]:
    """Tell what bets against a mean of `mean` or more have earned on these rows: the log of how many times the stake.

    capital(m) = sum_b stake_b prod_i (1 - b (e_i - m) / (1 - m))

    Args:
        errors: one error a row, in [0, 1].
        mean: the mean bet against.
        weight: how often each row counts: to foresee what more rows of the kind would earn.

    Returns:
        the log; it rises with the mean. -inf where a mean is negative or an error is not finite: nothing is earned there.
    """
    shown, level = errors.double(), mean.double()[..., None]
    gain = ((shown - level) / (1 - level)).clamp(max=1.0)
    bets = zip(_BETS, _STAKES, strict=True)
    earned = torch.stack([torch.log1p(-bet * gain).sum(-1) * weight + math.log(stake) for bet, stake in bets])
    earned = torch.logsumexp(earned, 0).masked_fill(level[..., 0] >= 1, torch.inf)
    return earned.masked_fill((level[..., 0] < 0) | ~torch.isfinite(shown).all(-1), -torch.inf)


def mean_bound(errors: Float[Tensor, "*head rows"], chance: float) -> Float[Tensor, "*head"]:
    """Bound the mean error of all rows from above, from one row drawn at random in each of equal strata.

    bound = the largest mean m of min(e, 1) with capital(m) < 1 / chance (see `log_capital`), + mean_i max(e_i - 1, 0)

    Why it holds. Let the strata's means be mu_s, and their mean, that of all rows, mu >= m. Rows are drawn independently,
    and the bets l = b / (1 - m) are fixed before they are seen, so the capital of one bet is expected to be
    prod_s (1 - l (mu_s - m)), which by the inequality of arithmetic and geometric means is at most
    (1 - l (mu - m))^rows <= 1; no factor is negative, as errors are at most 1 and b <= 1. So is that of a mixture, and by
    Markov's inequality it reaches 1 / chance with a chance of no more than `chance`. Further rows may be added until the
    bound suffices, in batches that have strata of their own: what bets earn is a supermartingale from batch to batch, so by
    Ville's inequality the same chance covers all looks. No normal approximation enters, hence confidence may be split over
    any number of heads and attempts.

    Source: Waudby-Smith and Ramdas, 2024 (arXiv:2010.09686), betting on bounded means.   Differs: a mixture of fixed bets,
    for which strata may have unequal means, in place of bets adapted on the way.
    Cost: O(30 * rows) a head.   Guarantee: P(bound < mean) <= chance for rows that err by at most 1, which is wholly wrong
    (`interval.WRONG_ROW`). By what rows exceed that is added as it was seen: estimated, not bounded; no rows but those that
    are wholly wrong are allowed for unseen. Where no row errs the bound is at most 1 - (0.4 chance)^(1 / rows).

    Args:
        errors: one error a row, 0 where a row counts for nothing.
        chance: of a bound below the mean.

    Returns:
        the bound; infinite where an error is not finite.
    """
    whole, excess = _split(errors)
    low, high = torch.zeros_like(excess), torch.ones_like(excess)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rejected = log_capital(whole, middle) >= -math.log(chance)
        low, high = torch.where(rejected, low, middle), torch.where(rejected, middle, high)
    return (high + excess).masked_fill(~torch.isfinite(whole.sum(-1)), torch.inf)


def _split(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Split row errors into what is bounded, at most wholly wrong, and the mean of what exceeds that."""
    shown = errors.double()
    return shown.clamp(max=WRONG_ROW), (shown - WRONG_ROW).clamp(min=0).mean(-1)


@torch.no_grad()
def certify(
    problem: Problem, out: Float[Tensor, "batch heads queries value_dim"], aim: Aim, rows: int, attempt: int
) -> tuple[Float[Tensor, "batch heads rows"], Float[Tensor, "batch heads"]]:
    """Judge an output on fresh rows, batch by batch, while more of them may still certify a kv head.

    Args:
        problem: the problem.
        out: what is to be certified, as it will be returned.
        aim: what is demanded.
        rows: rows that are likely to be enough; half of them are tried first, twice as many at most.
        attempt: number of the attempt, which has rows of its own.

    Returns:
        the errors of the rows judged, and the bounds.
    """
    most, seen = sum(math.ceil(part * rows) for part in _BATCHES), []
    for batch, part in enumerate(_BATCHES):
        index = fresh_rows(problem, math.ceil(part * rows), attempt, batch)
        seen.append(row_errors(out.index_select(2, index), exact_at(problem, index)))
        errors = torch.cat(seen, -1)
        bound = aim.bound(errors)
        enough = bound <= aim.tolerance
        passed, hoped = (of_group(x, problem.group) for x in (enough, enough | aim.foresee(errors, most)))
        if not (hoped & ~passed).any():
            break
    return errors, bound


def of_group(certified: Bool[Tensor, "batch heads"], group: int) -> Bool[Tensor, " kv_heads"]:
    """Tell for which kv heads all query heads are certified, in all batch entries."""
    return certified.unflatten(1, (-1, group)).all(2).all(0)


def fresh_rows(problem: Problem, rows: int, attempt: int, batch: int = 0) -> Int[Tensor, " rows"]:
    """Draw rows to certify, one from each of equal strata; every attempt and batch has its own.

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
