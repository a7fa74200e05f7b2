"""What anything that attends must offer, and what it will spend: the contract of a method."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from hyperattention.problem import Problem
from hyperattention.select.stage import LookAhead
from hyperattention.types import Partial


@dataclass(frozen=True)
class Cost:
    """What a method will spend on a sequence, before it runs.

    Args:
        pairs: slots listed per query, masked ones included.
        selection_pairs: query-key products spent on choosing, per query, in units of one full-length product.
        exact_pairs: keys that exact attention scores per query, on average.
        memory_bytes: keys, values and queries read and rows written, for one head in float32.
        complete: whether every key has an expected weight of one.
    """

    pairs: float
    selection_pairs: float
    exact_pairs: float
    memory_bytes: int
    complete: bool

    @property
    def share_of_exact(self) -> float:
        """Pairs listed, relative to those exact attention scores."""
        return self.pairs / self.exact_pairs if self.exact_pairs else 1.0


class AttentionMethod(ABC):
    """Anything that turns a problem into attention: a list of stages, exact attention, or a published algorithm."""

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
        """Whether a mask of keys is read as it is, so that no key need be moved to the front."""
        return False

    @abstractmethod
    def attend(self, problem: Problem) -> Partial:
        """Compute attention."""

    def attend_with_error(self, problem: Problem) -> tuple[Partial, Float[Tensor, "batch heads queries"]]:
        """Compute attention, and the standard error of every row; an approach that cannot tell it refuses, as this does."""
        raise NotImplementedError(
            f"{self!r} does not give the standard error of its rows: use a Method whose last stage is a Draw, or "
            "audit=64, which judges any output by exact rows"
        )

    def output(self, problem: Problem) -> Tensor:
        """Compute the output alone, which some methods have sooner than their lse."""
        return self.attend(problem).out

    @abstractmethod
    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Return the cost for as many queries as keys, before running."""


def exact_pairs(num_keys: int, is_causal: bool) -> float:
    """Count the keys that exact attention scores per query, on average."""
    return (num_keys + 1) / 2 if is_causal else float(num_keys)


def refuse_spans(method: AttentionMethod, problem: Problem) -> None:
    """Refuse to thin the queries of a method whose choice depends on all of them.

    Args:
        method: what is to run.
        problem: on which queries.

    Raises:
        ValueError: if the queries are spans, and the method looks at the whole sequence.
    """
    if problem.spans is not None and method.looks_ahead == LookAhead.SEQUENCE:
        raise ValueError(
            f"{method!r} chooses by all queries of a sequence, and was given some of them: run it on all of them"
        )


def check_method(method: object) -> None:
    """Check that `method` is one.

    Args:
        method: what should run.

    Raises:
        TypeError: if it is anything else, such as a stage alone.
    """
    if not isinstance(method, AttentionMethod):
        raise TypeError(f"method={method!r}: it must be Exact(), a preset, or stages wrapped as Method(...)")
