"""Error as an argument: spend for each head what a tolerance needs, and let no head pass whose error is not vouched for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.error.tolerance.certificate import Aim, certify, of_group, visible_to
from hyperattention.error.tolerance.ladder import Ladder, default_ladder
from hyperattention.error.tolerance.pilot import Pilot, cheapest, choose, pilot_spends, take_pilot
from hyperattention.error.tolerance.report import ToleranceReport
from hyperattention.methods.base import Approach, Cost
from hyperattention.methods.default import default_method
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.problem import Problem
from hyperattention.types import Partial

CONFIDENCE = 0.95
# how the chance of a wrong bound is divided: most for the rungs chosen, the rest for those that heads move up to
_ATTEMPTS = (0.8, 0.2)


@dataclass(frozen=True)
class _Rung:
    """A rung that is worth running in this call."""

    method: Method
    cost: Cost

    @property
    def spends(self) -> float:
        return self.cost.pairs + self.cost.selection_pairs


class _Call:
    """One call on its way up: which rung serves each kv head, what came of it, and what was spent."""

    def __init__(self, problem: Problem, tolerance: float, ladder: Ladder | None, *, lse: bool) -> None:
        self.problem, self.tolerance, self.lse = problem, tolerance, lse
        self.heads = list(range(problem.k.shape[1]))
        seen = visible_to(problem, torch.arange(problem.num_queries, dtype=torch.int64, device=problem.device))
        live = (seen > 0).double().mean(1, keepdim=True)
        # a batch entry that sees nothing has no error to bound
        live = live.masked_fill(live == 0, 1.0)
        self.exact_pairs = float(seen.double().mean()) if seen.numel() else 0.0
        count = max(1, problem.q.shape[0] * problem.q.shape[1])
        chances = [(1 - CONFIDENCE) * part / count for part in _ATTEMPTS]
        self.aims = [Aim(tolerance, chance, problem.num_queries, live) for chance in chances]
        self.ladder = self._affordable(ladder) if ladder is not None else []
        self.rungs: list[int | None] = [None for _ in self.heads]
        self.served: list[tuple[Tensor, Tensor | None, list[int]]] = []
        self.bound, self.excess = torch.zeros(2, *problem.q.shape[:2], dtype=torch.float64, device=problem.device)
        self.spent = [0.0 for _ in self.heads]
        self.rows = [0 for _ in self.heads]

    def _affordable(self, ladder: Ladder) -> list[_Rung]:
        """Keep the rungs that, with the rows that certify them, are worth running: counted, before anything runs."""
        problem, found = self.problem, []
        for method in ladder.rungs:
            cost = method.cost(problem.num_keys, is_causal=problem.causal, head_dim=problem.q.shape[3])
            rung = _Rung(method, cost)
            if self._total(rung) <= ladder.worth * self.exact_pairs:
                found.append(rung)
        # the pilot is paid whatever it finds: not where even the cheapest rung would then save nothing
        pilot = pilot_spends(found[0].spends, self.exact_pairs, problem.num_queries, ladder.tile) if found else 0.0
        return found if found and self._total(found[0]) + pilot <= ladder.worth * self.exact_pairs else []

    def _total(self, rung: _Rung) -> float:
        return rung.spends + self._rows_spend(self.aims[0].rows(rung.cost.pairs))

    def _rows_spend(self, rows: int) -> float:
        return rows / max(1, self.problem.num_queries) * self.exact_pairs

    def pilot(self, pilot: Pilot) -> None:
        """Choose a rung for every head."""
        pairs = [rung.cost.pairs for rung in self.ladder]
        choice = choose(pilot, [rung.method for rung in self.ladder], pairs, self.aims[0])
        self.rungs = list(choice.rungs)
        for head, probed in enumerate(choice.probed):
            self.spent[head] += self._rows_spend(len(pilot.index))
            self.spent[head] += sum(self.ladder[place].spends for place in probed) * pilot.share

    def attempt(self, number: int, heads: list[int]) -> list[int]:
        """Run the rungs of some heads and certify them on fresh rows; heads that fail move up.

        Returns:
            those that failed and have a rung to move to.
        """
        aim, again = self.aims[number], []
        chosen = {head: place for head in heads if (place := self.rungs[head]) is not None}
        for place in sorted(set(chosen.values())):
            group, rung = [head for head in heads if chosen[head] == place], self.ladder[place]
            few, out = self._run(rung.method, group)
            given = certify(few, out, aim, aim.rows(rung.cost.pairs), number)
            self._vouch(group, given.bound, given.excess)
            errors, passed = given.errors, of_group(given.bound <= self.tolerance, few.group).tolist()
            for head, own, fine in zip(group, errors.unflatten(1, (-1, few.group)).unbind(1), passed, strict=True):
                self.spent[head] += rung.spends + self._rows_spend(errors.shape[-1])
                self.rows[head] = errors.shape[-1]
                if not fine:
                    self.rungs[head] = self._above(own, place, number + 1)
                    again += [head] if self.rungs[head] is not None else []
        return again

    def _vouch(self, heads: list[int], bound: Tensor | float, excess: Tensor | float) -> None:
        """Write down what holds for the query heads of some kv heads."""
        rows = [head * self.problem.group + member for head in heads for member in range(self.problem.group)]
        self.bound[:, rows], self.excess[:, rows] = bound, excess

    def _above(self, errors: Tensor, place: int, number: int) -> int | None:
        """Find the rung that a head should move up to, by what its certificate saw."""
        if number == len(self.aims):
            return None
        return cheapest(errors, place, [rung.cost.pairs for rung in self.ladder], self.aims[number], first=place + 1)

    def run_exactly(self) -> None:
        """Serve the heads that have no rung."""
        heads = [head for head in self.heads if self.rungs[head] is None]
        if heads:
            self._run(Exact(), heads)
            self._vouch(heads, 0.0, 0.0)
            for head in heads:
                self.spent[head] += self.exact_pairs

    def _run(self, method: Approach, heads: list[int]) -> tuple[Problem, Tensor]:
        few = self.problem if heads == self.heads else self.problem.of_heads(heads)
        if isinstance(method, Exact) and not self.lse:
            out, lse = method.output(few), None
        else:
            partial = method.attend(few)
            out, lse = partial.out, partial.lse if self.lse else None
        # what is judged is what is returned, rounded as it is
        out = out.to(self.problem.q.dtype)
        self.served.append((out, lse, heads))
        return few, out

    def joined(self) -> tuple[Tensor, Tensor | None]:
        """Put the heads in order, each as it was served last."""
        last = {head: (number, at) for number, (_, _, heads) in enumerate(self.served) for at, head in enumerate(heads)}
        order = [last[head] for head in self.heads]
        lses = [lse for _, lse, _ in self.served if lse is not None]
        return self._in_order([out for out, _, _ in self.served], order), self._in_order(lses, order) if self.lse else None

    def _in_order(self, parts: Sequence[Tensor], order: list[tuple[int, int]]) -> Tensor:
        group, numbers = self.problem.group, {number for number, _ in order}
        if len(numbers) == 1:
            return parts[numbers.pop()]
        return torch.cat([parts[number][:, at * group : (at + 1) * group] for number, at in order], 1)


def attend_within(
    problem: Problem, tolerance: float, named: Ladder | None = None, *, lse: bool
) -> tuple[Partial | Tensor, ToleranceReport]:
    """Attend so that the mean relative row error of every query head of this output is, by its bound, within a tolerance.

    1. A pilot (`pilot.py`): whole tiles at evenly spaced positions, exact rows in them, and at most two rungs tried on them
       choose for each kv head the cheapest rung that is likely enough to pass. 2. Heads of one rung run together. 3. A
       certificate (`certificate.py`) on fresh rows bounds every query head's error; a kv head passes with the worst of its
       query heads, over the batch. 4. One that fails moves up, once, to the rung its certificate suggests, with fresh rows
       again; then to exact attention. The chance of a wrong bound, 5%, is divided over query heads and attempts.

    Rungs come into question while they and their certificate spend fewer pairs than the ladder says are worth it, and all
    of it only if the cheapest does so with the pilot. Without a ladder named, calls that `method=None` would serve exactly
    are served exactly.
    Differs from a method chosen beforehand: the output's own error decides.
    Cost: the rungs that run; beside them the pilot, and the exact rows of `Aim.rows`, a few times log(heads) / tolerance.
    Guarantee: with 95% confidence every head's mean of min(e, 1) is within its bound, as `mean_bound` states it. What rows
    err by above 1 is added as the rows drawn show it, so rare rows with huge errors can hide. A rung is the cheapest that
    was likely enough (two probes and an extrapolation), not surely the cheapest that would do. Rows are a pure function of
    layer, seed, attempt and batch: over many calls vary `seed`, or failures are not independent from call to call. Exact
    heads are as torch rounds them.

    Args:
        problem: the problem.
        tolerance: mean relative row error allowed.
        named: the ladder; None for the default one.
        lse: whether the log-sum-exp is wanted.

    Returns:
        out with lse, or alone, in the dtype of the query; and the report.
    """
    ladder, note = _ladder_of(problem, named)
    call = _Call(problem, tolerance, ladder, lse=lse)
    if ladder is not None and not note:
        note = _choose_rungs(call, ladder)
    left = [head for head in call.heads if call.rungs[head] is not None]
    for number in range(len(_ATTEMPTS)):
        left = call.attempt(number, left) if left else []
    call.run_exactly()
    out, log_sum = call.joined()
    methods = tuple(Exact() if rung is None else call.ladder[rung].method for rung in call.rungs)
    share = sum(call.spent) / len(call.spent) / call.exact_pairs if call.exact_pairs else 1.0
    report = ToleranceReport(tolerance, CONFIDENCE, methods, call.bound, call.excess, share, tuple(call.rows), note)
    return (out if log_sum is None else Partial(out, log_sum)), report


def exact_report(query: Tensor, key: Tensor, tolerance: float) -> ToleranceReport:
    """Report a call under a dense mask, which only exact attention reads."""
    methods, rows = (Exact(),) * key.shape[1], (0,) * key.shape[1]
    zero = torch.zeros(query.shape[:2], dtype=torch.float64, device=query.device)
    note = "no list of keys follows a dense attn_mask"
    return ToleranceReport(tolerance, CONFIDENCE, methods, zero, zero, 1.0, rows, note)


def _ladder_of(problem: Problem, named: Ladder | None) -> tuple[Ladder | None, str]:
    """Find the ladder to climb, or say why there is none."""
    if not problem.q.shape[0] * problem.num_queries * problem.num_keys:
        return None, "there is nothing to attend to"
    if named is not None:
        return named, ""
    if isinstance(default_method(problem.num_keys, num_queries=problem.num_queries, device=problem.device), Exact):
        return None, f"{problem.num_queries} queries and {problem.num_keys} keys are below the crossover"
    return default_ladder(problem.num_keys, device=problem.device), ""


def _choose_rungs(call: _Call, ladder: Ladder) -> str:
    """Let a pilot choose, or say why no rung comes into question."""
    count = call.problem.num_queries
    if not call.ladder:
        return f"no rung is worth running with the rows that choose and certify it, among {count} queries"
    with torch.no_grad():
        pilot = take_pilot(call.problem, ladder.tile)
        if pilot is None:
            return f"{count} queries are too few whole tiles for a pilot"
        call.pilot(pilot)
    return ""
