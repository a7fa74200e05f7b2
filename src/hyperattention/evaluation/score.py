"""How right an answer is, and how sure a share of right answers is."""

import math
import re
from dataclasses import dataclass

from hyperattention.evaluation.item import Item

_Z = 1.959964


@dataclass(frozen=True)
class Mark:
    """How right one answer is.

    Args:
        answer: what was expected.
        said: what the model continued with.
        depth: where in the context it was told.
        right: whether the answer was found in what was said.
        digits: share of its characters in the right place.
    """

    answer: str
    said: str
    depth: float
    right: bool
    digits: float


def marks(item: Item, outputs: tuple[str, ...]) -> tuple[Mark, ...]:
    """Compare what a model said with what was expected.

    Args:
        item: what was asked.
        outputs: what was said, for each turn.

    Returns:
        a mark for each answer of each turn.
    """
    return tuple(
        Mark(answer, said, depth, answer in said, _share(answer, said))
        for turn, said in zip(item.turns, outputs, strict=True)
        for answer, depth in zip(turn.answers, turn.depths, strict=True)
    )


def _share(answer: str, said: str) -> float:
    """Take the best of the words said."""
    words = re.findall(r"\w+", said)
    return max((sum(a == b for a, b in zip(answer, word, strict=False)) / len(answer) for word in words), default=0.0)


@dataclass(frozen=True)
class Share:
    """A share of right answers, with its interval.

    p = (s + z^2 / 2 +- z sqrt(s (n - s) / n + z^2 / 4)) / (n + z^2)
    Source: Wilson, 1927, "Probable inference, the law of succession, and statistical inference".   Differs: nothing.
    Guarantee: 95% on average over shares, were the answers independent; those of one context are not quite.

    Args:
        right: right answers.
        total: all answers.
    """

    right: int
    total: int

    @property
    def value(self) -> float:
        """The share."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95% interval."""
        s, n, z2 = self.right, self.total, _Z**2
        middle, spread = s + z2 / 2, _Z * math.sqrt(s * (n - s) / n + z2 / 4)
        low, high = (middle - spread) / (n + z2), (middle + spread) / (n + z2)
        # at the ends the formula is 0 and 1, but for rounding
        return (0.0 if s == 0 else low), (1.0 if s == n else high)
