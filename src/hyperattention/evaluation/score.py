"""Scores of answers, and the confidence interval of a share of correct answers."""

import math
import re
from dataclasses import dataclass

from hyperattention.evaluation.item import Item

_Z = 1.959964


@dataclass(frozen=True)
class Mark:
    """The score of one answer.

    Args:
        answer: the expected answer.
        said: the model's continuation.
        depth: place of the fact in the context, 0 to 1.
        right: whether the continuation contains the answer.
        digits: share of the answer's characters at the correct place.
    """

    answer: str
    said: str
    depth: float
    right: bool
    digits: float


def marks(item: Item, outputs: tuple[str, ...]) -> tuple[Mark, ...]:
    """Compare the outputs of a model with the expected answers.

    Args:
        item: the item.
        outputs: the model's continuation, for each turn.

    Returns:
        a mark for each answer of each turn.
    """
    return tuple(
        Mark(answer, said, depth, answer in said, _share(answer, said))
        for turn, said in zip(item.turns, outputs, strict=True)
        for answer, depth in zip(turn.answers, turn.depths, strict=True)
    )


def _share(answer: str, said: str) -> float:
    """Compute the share of correct characters, for the best word of the continuation."""
    words = re.findall(r"\w+", said)
    return max((sum(a == b for a, b in zip(answer, word, strict=False)) / len(answer) for word in words), default=0.0)


@dataclass(frozen=True)
class Share:
    """A share of correct answers, with its interval.

    p = (s + z^2 / 2 +- z sqrt(s (n - s) / n + z^2 / 4)) / (n + z^2)
    Source: Wilson, 1927, "Probable inference, the law of succession, and statistical inference".   Differs: nothing.
    Guarantee: 95% on average over shares, if answers are independent; answers from one context are slightly dependent.

    Args:
        right: number of correct answers.
        total: number of all answers.
    """

    right: int
    total: int

    @property
    def value(self) -> float:
        """The share."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the share."""
        s, n, z2 = self.right, self.total, _Z**2
        middle, spread = s + z2 / 2, _Z * math.sqrt(s * (n - s) / n + z2 / 4)
        low, high = (middle - spread) / (n + z2), (middle + spread) / (n + z2)
        # at the ends the formula gives 0 and 1 except for rounding
        return (0.0 if s == 0 else low), (1.0 if s == n else high)
