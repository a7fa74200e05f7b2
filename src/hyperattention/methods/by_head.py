"""A method for each head: heads with sharp and with diffuse attention need different keys and budgets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.methods.base import AttentionMethod, Cost
from hyperattention.problem import Problem
from hyperattention.select.stage import LookAhead
from hyperattention.types import Partial


@dataclass(frozen=True)
class ByHead(AttentionMethod):
    """Run a separate method for every kv head, with the query heads that share it.

    Query heads of a group share lists of keys, hence one method per kv head. Heads with equal methods run together; their
    draws are the same as if all heads ran that method.

    Source: head-wise budgets as in Feng et al., 2024 (arXiv:2407.11550), Ada-KV.   Differs: methods per head, not cache
    sizes.
    Cost: the mean cost of the methods, and a copy of the output.   Guarantee: that of each method, for its heads.

    Args:
        methods: one for each kv head.

    Raises:
        TypeError: if one of them is not a method, or is a ByHead.
        ValueError: if `methods` is empty.

    Example:
        >>> ByHead((Exact(), Method(Sinks(4), Window(256), Draw(64))))
    """

    methods: tuple[AttentionMethod, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        if not self.methods:
            raise ValueError("ByHead(()): give one method for each kv head")
        for method in self.methods:
            if not isinstance(method, AttentionMethod) or isinstance(method, ByHead):
                raise TypeError(f"ByHead takes methods such as Method(...) or Exact(), not {method!r}")

    @property
    def complete(self) -> bool:
        """Whether every head's method is complete."""
        return all(method.complete for method in self.methods)

    @property
    def looks_ahead(self) -> LookAhead:
        """The farthest look-ahead of any head's method."""
        return max(method.looks_ahead for method in self.methods)

    def groups(self) -> dict[AttentionMethod, list[int]]:
        """List the kv heads of each method."""
        served: dict[AttentionMethod, list[int]] = {}
        for head, method in enumerate(self.methods):
            served.setdefault(method, []).append(head)
        return served

    def attend(self, problem: Problem) -> Partial:
        """Compute attention head by head; heads with equal methods run together.

        Args:
            problem: the problem.

        Returns:
            the rows of all heads, in order.
        """
        parts = [method.attend(part) for method, part in self._parts(problem)]
        return Partial(self._in_order([part.out for part in parts]), self._in_order([part.lse for part in parts]))

    def attend_counted(self, problem: Problem) -> tuple[Partial, Int[Tensor, "batch heads"] | None]:
        """Compute attention head by head, and count the rows of every head that lost a part to rounding.

        Args:
            problem: the problem.

        Returns:
            the rows of all heads, in order, and the counts; None if no method counts, 0 for heads whose method does not.
        """
        parts = [method.attend_counted(part) for method, part in self._parts(problem)]
        out, lse = (self._in_order(list(x)) for x in zip(*((part.out, part.lse) for part, _ in parts), strict=True))
        if all(count is None for _, count in parts):
            return Partial(out, lse), None
        counts = [part.lse.new_zeros(part.lse.shape[:2], dtype=torch.int64) if n is None else n for part, n in parts]
        return Partial(out, lse), self._in_order(counts)

    def output(self, problem: Problem) -> Tensor:
        """Compute the output alone: heads with exact attention then run torch's own kernel.

        Args:
            problem: the problem.

        Returns:
            the rows of all heads, in order.
        """
        return self._in_order([method.output(part) for method, part in self._parts(problem)])

    def attend_with_error(self, problem: Problem) -> tuple[Partial, Float[Tensor, "batch heads queries"]]:
        """Compute attention head by head, and the standard error of every row by each head's method.

        Args:
            problem: the problem.

        Returns:
            the rows of all heads, in order, and their standard errors; errors of the methods are passed on.
        """
        parts = [method.attend_with_error(part) for method, part in self._parts(problem)]
        out, lse, error = (
            self._in_order(list(x)) for x in zip(*((part.out, part.lse, error) for part, error in parts), strict=True)
        )
        return Partial(out, lse), error

    def _parts(self, problem: Problem) -> list[tuple[AttentionMethod, Problem]]:
        """Split a problem among the methods.

        Returns:
            each method with the problem of its heads.

        Raises:
            ValueError: if the problem has another number of kv heads.
        """
        num = problem.k.shape[1]
        if num != len(self.methods):
            raise ValueError(
                f"ByHead has {len(self.methods)} methods and the keys have {num} heads: give one method for each kv head"
            )
        groups = self.groups()
        if len(groups) == 1:
            return [(self.methods[0], problem)]
        return [(method, problem.of_heads(heads)) for method, heads in groups.items()]

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        """Put the rows of all groups of heads back in head order."""
        if len(parts) == 1:
            return parts[0]
        heads = [head for served in self.groups().values() for head in served]
        # no numbers of heads are copied to the device, for which the host would wait
        joined = torch.cat(parts, 1)
        rows = joined.unflatten(1, (len(heads), joined.shape[1] // len(heads))).unbind(1)
        return torch.cat([rows[heads.index(head)] for head in range(len(heads))], 1)

    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Return the cost, averaged over the heads.

        Args:
            num_keys: length of the sequence.
            is_causal: whether queries see only earlier keys.
            head_dim: width of keys, and of values.

        Returns:
            the cost.
        """
        return mean_cost([each.cost(num_keys, is_causal=is_causal, head_dim=head_dim) for each in self.methods])


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """Average the costs of methods that each run on an equal share of a model's heads or layers.

    Args:
        costs: the cost of each method, at one length.

    Returns:
        their mean; complete if all of them are complete.
    """
    count = len(costs)
    return Cost(
        sum(cost.pairs for cost in costs) / count,
        sum(cost.selection_pairs for cost in costs) / count,
        costs[0].exact_pairs,
        sum(cost.memory_bytes for cost in costs) // count,
        all(cost.complete for cost in costs),
    )
