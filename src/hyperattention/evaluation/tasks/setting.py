"""The settings of every task: length, depths and number of contexts."""

import random
from dataclasses import dataclass

from hyperattention.evaluation.haystack import Haystack


@dataclass(frozen=True)
class Setting:
    """The settings from which a task makes items.

    Args:
        haystack: the text, and the dialect of the facts.
        length: largest number of tokens of context, questions and answers together.
        depths: number of ranges of depth, of equal size.
        contexts: number of contexts of each kind.
        seed: seed of texts, keys, values and places.
    """

    haystack: Haystack
    length: int
    depths: int = 8
    contexts: int = 1
    seed: int = 0

    @property
    def context(self) -> int:
        """The number of tokens of a context.

        Raises:
            ValueError: if questions and answers leave no tokens for a context.
        """
        if self.length <= 2 * self.haystack.dialect.reserve:
            raise ValueError(
                f"length {self.length}: questions and answers alone may take {self.haystack.dialect.reserve} tokens; "
                f"give more than {2 * self.haystack.dialect.reserve}"
            )
        return self.length - self.haystack.dialect.reserve

    def rng(self, task: str) -> random.Random:
        """Make the random generator of one task; equal settings give equal generators.

        Args:
            task: the name of the task.

        Returns:
            the random generator.
        """
        return random.Random(f"{task} {self.length} {self.seed}")

    def spread(self, num: int, rng: random.Random) -> list[float]:
        """Draw one random depth in each of `num` equal ranges.

        Args:
            num: number of depths.
            rng: the random generator.

        Returns:
            the depths, ascending.
        """
        return [(place + rng.random()) / num for place in range(num)]
