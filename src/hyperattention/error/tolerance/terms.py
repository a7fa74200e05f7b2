"""The terms of a call with a tolerance: the requirements of its certificates, and the rungs that may run."""

from dataclasses import dataclass

import torch

from hyperattention.error.tolerance.certificate import Aim, visible_to
from hyperattention.error.tolerance.ladder import Ladder
from hyperattention.error.tolerance.pilot import pilot_spends
from hyperattention.methods.base import Cost
from hyperattention.methods.method import Method
from hyperattention.problem import Problem

CONFIDENCE = 0.95
# how the probability of a wrong bound is divided: most for the rungs chosen first, the rest for rungs that heads move up to
ATTEMPTS = (0.8, 0.2)


@dataclass(frozen=True)
class Rung:
    """A method of a ladder, and its cost in this call.

    Args:
        method: the method.
        cost: cost of the method, before it runs.
    """

    method: Method
    cost: Cost

    @property
    def spends(self) -> float:
        """Pairs listed and scored for each query."""
        return self.cost.pairs + self.cost.selection_pairs


@dataclass(frozen=True)
class Terms:
    """The fixed data of a call with a tolerance.

    Args:
        problem: the problem.
        tolerance: mean relative row error allowed.
        aims: requirements of the certificates, for each attempt.
        exact_pairs: keys that exact attention scores per query, on average.
        lse: whether the log-sum-exp is wanted.
    """

    problem: Problem
    tolerance: float
    aims: tuple[Aim, ...]
    exact_pairs: float
    lse: bool

    def rows_spend(self, rows: int) -> float:
        """Pairs of `rows` rows of exact attention, per query of the call."""
        return rows / max(1, self.problem.num_queries) * self.exact_pairs

    def total(self, rung: Rung) -> float:
        """Pairs of a rung and of the rows that certify it, per query."""
        return rung.spends + self.rows_spend(self.aims[0].rows(rung.cost.pairs))


def terms_of(problem: Problem, tolerance: float, lse: bool) -> Terms:
    """Count the pairs of exact attention, and divide the probability of a wrong bound over heads and attempts.

    Args:
        problem: the problem.
        tolerance: mean relative row error allowed.
        lse: whether the log-sum-exp is wanted.

    Returns:
        the terms.
    """
    seen = visible_to(problem, torch.arange(problem.num_queries, dtype=torch.int64, device=problem.device))
    live = (seen > 0).double().mean(1, keepdim=True)
    # a batch entry that sees no key has no error to bound
    live = live.masked_fill(live == 0, 1.0)
    count = max(1, problem.q.shape[0] * problem.q.shape[1])
    aims = tuple(Aim(tolerance, (1 - CONFIDENCE) * part / count, problem.num_queries, live) for part in ATTEMPTS)
    return Terms(problem, tolerance, aims, float(seen.double().mean()) if seen.numel() else 0.0, lse)


def affordable(terms: Terms, ladder: Ladder) -> tuple[Rung, ...]:
    """Return the rungs that are cheap enough to run together with the rows that certify them, counted before anything runs.

    Args:
        terms: terms of the call.
        ladder: methods of increasing cost.

    Returns:
        the rungs; none if even the cheapest rung and the pilot together would save nothing.
    """
    problem, worth = terms.problem, ladder.worth * terms.exact_pairs
    rungs = [
        Rung(method, method.cost(problem.num_keys, is_causal=problem.causal, head_dim=problem.q.shape[3]))
        for method in ladder.rungs
    ]
    found = tuple(rung for rung in rungs if terms.total(rung) <= worth)
    if not found:
        return ()
    # the pilot costs the same for every result: no pilot if it and the cheapest rung together would save nothing
    pilot = pilot_spends(found[0].spends, terms.exact_pairs, problem.num_queries, ladder.tile)
    return found if terms.total(found[0]) + pilot <= worth else ()
