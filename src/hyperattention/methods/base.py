"""The base class of every attention method, and the cost of a method."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.problem import Problem
from hyperattention.select.stage import LookAhead
from hyperattention.types import Partial


@dataclass(frozen=True)
class Cost:
    """The cost of a method on a sequence, computed before the method runs.

    Args:
        pairs: slots listed per query, masked ones included.
        selection_pairs: query-key products spent on choosing keys, per query, in units of one full-length product.
        exact_pairs: keys that exact attention scores per query, on average.
        memory_bytes: bytes of keys, values and queries read and of rows written, for one head in float32.
        complete: whether every key has an expected weight of one.
    """

    pairs: float
    selection_pairs: float
    exact_pairs: float
    memory_bytes: int
    complete: bool

    @property
    def share_of_exact(self) -> float:
        """Pairs listed, relative to the pairs that exact attention scores."""
        return self.pairs / self.exact_pairs if self.exact_pairs else 1.0


class AttentionMethod(ABC):
    """An algorithm that computes attention for a problem: a list of stages, exact attention, or a published algorithm."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether every visible key has an expected weight of one."""

    @property
    @abstractmethod
    def looks_ahead(self) -> LookAhead:
        """How far beyond a row its list may depend on queries or keys."""

    @property
    def follows_masks(self) -> bool:
        """Whether the method reads a key mask itself, so that no key needs to be moved to the front."""
        return False

    @abstractmethod
    def attend(self, problem: Problem) -> Partial:
        """Compute attention."""

    def attend_with_error(self, problem: Problem) -> tuple[Partial, Float[Tensor, "batch heads queries"]]:
        """Compute attention, and the standard error of every row; a method that cannot estimate it raises, as here."""
        raise NotImplementedError(
            f"{self!r} does not give the standard error of its rows: use a Method whose last stage is a Draw, or "
            "audit=64, which compares any output with exact rows"
        )

    def attend_counted(self, problem: Problem) -> tuple[Partial, Int[Tensor, "batch heads"] | None]:
        """Compute attention, and count the rows of each head that lost a part to rounding; None if no row can."""
        return self.attend(problem), None

    def output(self, problem: Problem) -> Tensor:
        """Compute the output alone, which is cheaper than output and lse for some methods."""
        return self.attend(problem).out

    @abstractmethod
    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Return the cost for as many queries as keys, before running."""


def exact_pairs(num_keys: int, is_causal: bool) -> float:
    """Count the keys that exact attention scores per query, on average."""
    return (num_keys + 1) / 2 if is_causal else float(num_keys)


def refuse_spans(method: AttentionMethod, problem: Problem) -> None:
    """Refuse a subset of the queries for a method whose choice of keys depends on all of them.

    Args:
        method: the method that would run.
        problem: the problem with the queries.

    Raises:
        ValueError: if the queries are spans, and the method depends on the entire sequence.
    """
    if problem.spans is not None and method.looks_ahead == LookAhead.SEQUENCE:
        raise ValueError(
            f"{method!r} chooses keys by all queries of a sequence, but was given some of them: run it on all queries"
        )


def check_method(method: object) -> None:
    """Check that `method` is an attention method.

    Args:
        method: the argument to check.

    Raises:
        TypeError: if `method` is not an attention method, for example a single stage.
    """
    if not isinstance(method, AttentionMethod):
        raise TypeError(f"method={method!r}: it must be Exact(), a preset, or stages wrapped as Method(...)")
