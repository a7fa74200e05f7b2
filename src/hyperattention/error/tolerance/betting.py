"""Betting on bounded means: a bound on the mean error of all rows from rows drawn at random, for any distribution."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.error.interval import WRONG_ROW

# shares of the largest bet allowed, and how the capital is divided among them. The largest is best for rows of similar
# error, and alone decides if all errors are 0; the others are for a few completely wrong rows
_BETS = (1.0, 0.75, 0.5, 0.25)
STAKES = (0.4, 0.2, 0.2, 0.2)
# halvings of the interval in which the bound lies: double precision has no more
_HALVINGS = 30


def log_capital(
    errors: Float[Tensor, "*head rows"], mean: Float[Tensor, "*#head"], weight: float = 1.0
) -> Float[Tensor, "*head"]:
    """Return the log of the capital, per stake, of bets that the mean is below `mean`, after these rows.

    capital(m) = sum_b stake_b prod_i (1 - b (e_i - m) / (1 - m))

    Args:
        errors: one error per row, in [0, 1].
        mean: the mean bet against.
        weight: how often each row counts, to predict the capital after more rows of this kind.

    Returns:
        the log; it rises with the mean. -inf (no evidence) if a mean is negative or an error is not finite.
    """
    shown, level = errors.double(), mean.double()[..., None]
    gain = ((shown - level) / (1 - level)).clamp(max=1.0)
    bets = zip(_BETS, STAKES, strict=True)
    earned = torch.stack([torch.log1p(-bet * gain).sum(-1) * weight + math.log(stake) for bet, stake in bets])
    earned = torch.logsumexp(earned, 0).masked_fill(level[..., 0] >= 1, torch.inf)
    return earned.masked_fill((level[..., 0] < 0) | ~torch.isfinite(shown).all(-1), -torch.inf)


def mean_bound(errors: Float[Tensor, "*head rows"], chance: float) -> Float[Tensor, "*head"]:
    """Bound the mean error of all rows from above, from one row drawn at random in each of equal strata.

    bound = the largest mean m of min(e, 1) with capital(m) < 1 / chance (see `log_capital`), + mean_i max(e_i - 1, 0)

    Proof. Let the strata's means be mu_s, and their mean, that of all rows, mu >= m. Rows are drawn independently,
    and the bets l = b / (1 - m) are fixed before they are seen, so the capital of one bet is expected to be
    prod_s (1 - l (mu_s - m)), which by the inequality of arithmetic and geometric means is at most
    (1 - l (mu - m))^rows <= 1; no factor is negative, as errors are at most 1 and b <= 1. So is that of a mixture, and by
    Markov's inequality it reaches 1 / chance with a probability of at most `chance`. Further rows may be added until the
    bound suffices, in batches with separate strata: the capital is a supermartingale from batch to batch, so by Ville's
    inequality the same probability covers all looks, and the smallest of their bounds holds. No normal approximation enters,
    hence confidence may be split over any number of heads and attempts.

    Source: Waudby-Smith and Ramdas, 2024 (arXiv:2010.09686), betting on bounded means.   Differs: a mixture of fixed bets,
    for which strata may have unequal means, in place of adaptive bets.
    Cost: O(30 * rows) per head.   Guarantee: P(bound < mean) <= chance for rows with errors of at most 1, a completely wrong
    row (`interval.WRONG_ROW`). The part of errors above 1 is added as its mean over the drawn rows: it is estimated, not
    bounded. Unsampled rows are assumed to have errors of at most 1. If all errors are 0 the bound is at most
    1 - (0.4 chance)^(1 / rows).

    Args:
        errors: one error per row, 0 for a row that does not count.
        chance: probability of a bound below the mean.

    Returns:
        the bound; infinite if an error is not finite.
    """
    whole, excess = split_errors(errors)
    low, high = torch.zeros_like(excess), torch.ones_like(excess)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rejected = log_capital(whole, middle) >= -math.log(chance)
        low, high = torch.where(rejected, low, middle), torch.where(rejected, middle, high)
    return high + excess


def split_errors(
    errors: Float[Tensor, "*head rows"],
) -> tuple[Float[Tensor, "*head rows"], Float[Tensor, "*head"]]:
    """Split row errors into a bounded and an estimated part.

    Args:
        errors: one error per row.

    Returns:
        min(e, 1), which is bounded; and the mean of max(e - 1, 0), which is estimated, infinite if an error is not finite.
    """
    shown = errors.double()
    excess = (shown - WRONG_ROW).clamp(min=0).mean(-1)
    return shown.clamp(max=WRONG_ROW), excess.nan_to_num(nan=torch.inf, posinf=torch.inf)
