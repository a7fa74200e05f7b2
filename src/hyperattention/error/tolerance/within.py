"""Attention within a tolerance: each head gets the budget it needs, and no head is returned without an error bound."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperattention.error.tolerance.certificate import Certificate, certify, of_group
from hyperattention.error.tolerance.ladder import Ladder, default_ladder
from hyperattention.error.tolerance.pilot import Choice, cheapest, choose, take_pilot
from hyperattention.error.tolerance.report import ToleranceReport
from hyperattention.error.tolerance.terms import ATTEMPTS, CONFIDENCE, Rung, Terms, affordable, terms_of
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.default import lean_method
from hyperattention.methods.exact import Exact
from hyperattention.problem import Problem


@dataclass(frozen=True)
class _Group:
    """The result of one method for some kv heads that ran together.

    `rung` is its number, None for exact attention, which needs no certificate; `spends` are pairs per query and head.
    """

    heads: tuple[int, ...]
    rung: int | None
    out: Tensor
    lse: Tensor | None
    certificate: Certificate | None
    spends: float

    def failed(self, tolerance: float, group: int) -> list[tuple[int, Tensor]]:
        """List the heads that are not certified, with the errors of their rows."""
        if self.certificate is None:
            return []
        passed = of_group(self.certificate.bound <= tolerance, group).tolist()
        errors = self.certificate.errors.unflatten(1, (-1, group)).unbind(1)
        return [(head, own) for head, own, fine in zip(self.heads, errors, passed, strict=True) if not fine]


def attend_within(
    problem: Problem, tolerance: float, named: Ladder | None = None, *, lse: bool
) -> tuple[Tensor, Tensor | None, ToleranceReport]:
    """Compute attention so that the bound of every query head's mean relative row error is within a tolerance.

    1. A pilot (`pilot.py`) computes exact rows in complete tiles at evenly spaced positions, tries at most two rungs on
       them, and chooses for each kv head the cheapest rung that is likely to pass.
    2. Heads with the same rung run together.
    3. A certificate (`certificate.py`) on fresh rows bounds every query head's error; a kv head passes if the worst of its
       query heads passes, over the batch.
    4. A head that fails moves up once, to the rung that its certificate suggests, with fresh rows; if it fails again, exact
       attention runs.

    The probability of a wrong bound, 5%, is divided over query heads and attempts.

    A rung may run if it and its certificate spend fewer pairs than the ladder's `worth` allows; no rung runs if the cheapest
    one and the pilot exceed this limit. Without a ladder, exact attention runs wherever `lean_method` would run it.
    Differs from a method chosen beforehand: the measured error of the output decides.
    Cost: the rungs that run, the pilot, and the exact rows of `Aim.rows`, a few times log(heads) / tolerance.
    Guarantee: with 95% confidence every head's mean of min(e, 1) is within its bound, as `mean_bound` states it;
    `ToleranceReport` lists the limits of this. The chosen rung is predicted from two probes and an extrapolation; a cheaper
    one might also pass. Exact heads have torch's rounding errors.

    Args:
        problem: the problem.
        tolerance: mean relative row error allowed.
        named: the ladder; None for the default one.
        lse: whether the log-sum-exp is wanted.

    Returns:
        out in the dtype of the query; its lse, None if not wanted; and the report.
    """
    terms = terms_of(problem, tolerance, lse)
    ladder, note = _ladder_of(problem, named)
    rungs = affordable(terms, ladder) if ladder is not None else ()
    choice: Choice | None = None
    if ladder is not None and not note:
        choice, note = _choose(terms, ladder, rungs)
    chosen = dict(enumerate(choice.rungs)) if choice is not None else dict.fromkeys(range(problem.k.shape[1]))
    groups: list[_Group] = []
    climbing = {head: rung for head, rung in chosen.items() if rung is not None}
    for attempt in range(len(ATTEMPTS)):
        served = [_serve(terms, rungs[place], place, heads, attempt) for place, heads in _by_rung(climbing)]
        groups += served
        climbing, given_up = _move_up(terms, rungs, served, attempt)
        chosen |= climbing | given_up
    if left := tuple(head for head, rung in chosen.items() if rung is None):
        groups.append(_run(terms, Exact(), None, left, terms.exact_pairs))
    return _joined(terms, groups, rungs, choice, note)


def exact_report(query: Tensor, key: Tensor, tolerance: float) -> ToleranceReport:
    """Report a call under a dense mask, which only exact attention reads."""
    methods, rows = (Exact(),) * key.shape[1], (0,) * key.shape[1]
    zero = torch.zeros(query.shape[:2], dtype=torch.float64, device=query.device)
    note = "no list of keys follows a dense attn_mask"
    return ToleranceReport(tolerance, CONFIDENCE, methods, zero, zero, 1.0, rows, note)


def _ladder_of(problem: Problem, named: Ladder | None) -> tuple[Ladder | None, str]:
    """Return the ladder to use, or the reason why there is none."""
    if not problem.q.shape[0] * problem.num_queries * problem.num_keys:
        return None, "there is nothing to attend to"
    if named is not None:
        return named, ""
    if isinstance(lean_method(problem.num_keys, num_queries=problem.num_queries, device=problem.device), Exact):
        return None, f"{problem.num_queries} queries and {problem.num_keys} keys are below the crossover"
    return default_ladder(problem.num_keys, device=problem.device), ""


def _choose(terms: Terms, ladder: Ladder, rungs: tuple[Rung, ...]) -> tuple[Choice | None, str]:
    """Let a pilot choose a rung for every head, or return the reason why no rung can run."""
    count = terms.problem.num_queries
    if not rungs:
        return None, f"no rung is worth running together with the rows that choose and certify it, for {count} queries"
    with torch.no_grad():
        pilot = take_pilot(terms.problem, ladder.tile)
        if pilot is None:
            return None, f"{count} queries have too few complete tiles for a pilot"
        choice = choose(pilot, [rung.method for rung in rungs], [rung.cost.pairs for rung in rungs], terms.aims[0])
    spent = tuple(
        terms.rows_spend(len(pilot.index)) + sum(rungs[place].spends for place in probed) * pilot.share
        for probed in choice.probed
    )
    return replace(choice, spends=spent), ""


def _by_rung(climbing: dict[int, int]) -> list[tuple[int, tuple[int, ...]]]:
    """Collect the heads of each rung, so that they run together."""
    return [
        (place, tuple(head for head, rung in climbing.items() if rung == place)) for place in sorted(set(climbing.values()))
    ]


def _serve(terms: Terms, rung: Rung, place: int, heads: tuple[int, ...], attempt: int) -> _Group:
    """Run a rung for some heads, and certify it on fresh rows."""
    aim = terms.aims[attempt]
    ran = _run(terms, rung.method, place, heads, rung.spends)
    certificate = certify(_of_heads(terms.problem, heads), ran.out, aim, aim.rows(rung.cost.pairs), attempt)
    spends = rung.spends + terms.rows_spend(certificate.errors.shape[-1])
    return replace(ran, certificate=certificate, spends=spends)


def _move_up(
    terms: Terms, rungs: tuple[Rung, ...], served: list[_Group], attempt: int
) -> tuple[dict[int, int], dict[int, None]]:
    """Find for each failed head the rung to move up to, from its certificate; and the heads that have no such rung."""
    climbing: dict[int, int] = {}
    given_up: dict[int, None] = {}
    pairs, last = [rung.cost.pairs for rung in rungs], attempt + 1 == len(terms.aims)
    for group in served:
        at = group.rung
        for head, errors in group.failed(terms.tolerance, terms.problem.group):
            above = None if last or at is None else cheapest(errors, at, pairs, terms.aims[attempt + 1], first=at + 1)
            if above is None:
                given_up[head] = None
            else:
                climbing[head] = above
    return climbing, given_up


def _of_heads(problem: Problem, heads: tuple[int, ...]) -> Problem:
    return problem if heads == tuple(range(problem.k.shape[1])) else problem.of_heads(heads)


def _run(terms: Terms, method: AttentionMethod, place: int | None, heads: tuple[int, ...], spends: float) -> _Group:
    few = _of_heads(terms.problem, heads)
    if isinstance(method, Exact) and not terms.lse:
        out, lse = method.output(few), None
    else:
        partial = method.attend(few)
        out, lse = partial.out, partial.lse if terms.lse else None
    # the certified output is the returned one, rounding included
    return _Group(heads, place, out.to(terms.problem.q.dtype), lse, None, spends)


def _joined(
    terms: Terms, groups: list[_Group], rungs: tuple[Rung, ...], choice: Choice | None, note: str
) -> tuple[Tensor, Tensor | None, ToleranceReport]:
    """Put the last result of each head in head order, and report the cost of all of them."""
    problem, heads = terms.problem, range(terms.problem.k.shape[1])
    last = {head: number for number, group in enumerate(groups) for head in group.heads}
    bound, excess = torch.zeros(2, *problem.q.shape[:2], dtype=torch.float64, device=problem.device)
    for head, number in last.items():
        group, certificate = groups[number], groups[number].certificate
        if certificate is not None:
            own, at = _rows_of(head, problem.group), _rows_of(group.heads.index(head), problem.group)
            bound[:, own], excess[:, own] = certificate.bound[:, at], certificate.excess[:, at]
    spent = sum(group.spends * len(group.heads) for group in groups) + (sum(choice.spends) if choice is not None else 0.0)
    share = spent / len(heads) / terms.exact_pairs if terms.exact_pairs else 1.0
    methods = tuple(Exact() if (rung := groups[last[head]].rung) is None else rungs[rung].method for head in heads)
    report = ToleranceReport(
        tolerance=terms.tolerance,
        confidence=CONFIDENCE,
        methods=methods,
        bound=bound,
        excess=excess,
        share_of_pairs=share,
        num_rows=tuple(_rows_judged(groups, head) for head in heads),
        note=note,
    )
    out = _in_order([group.out for group in groups], groups, last, problem.group)
    lses = [group.lse for group in groups if group.lse is not None]
    return out, _in_order(lses, groups, last, problem.group) if terms.lse else None, report


def _rows_of(kv_head: int, group: int) -> slice:
    """Return the slice of the query heads of a kv head."""
    return slice(kv_head * group, (kv_head + 1) * group)


def _rows_judged(groups: list[_Group], head: int) -> int:
    """Return the number of rows of a head's last certificate; 0 if there was none."""
    certificates = [group.certificate for group in groups if head in group.heads and group.certificate is not None]
    return certificates[-1].errors.shape[-1] if certificates else 0


def _in_order(parts: Sequence[Tensor], groups: list[_Group], last: dict[int, int], group: int) -> Tensor:
    """Join the results in head order; without a copy if one method ran for all heads."""
    if len(set(last.values())) == 1:
        return parts[last[0]]
    places = [(last[head], groups[last[head]].heads.index(head)) for head in range(len(last))]
    return torch.cat([parts[number][:, _rows_of(at, group)] for number, at in places], 1)
