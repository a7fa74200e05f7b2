"""What every task is told: how long, how deep, how many."""

import random
from dataclasses import dataclass

from hyperattention.evaluation.haystack import Haystack


@dataclass(frozen=True)
class Setting:
    """What a task makes items for.

    Args:
        haystack: the text, and how facts are told.
        length: tokens that context, questions and answers may take together.
        depths: ranges of depth, of equal size.
        contexts: how many contexts of each kind.
        seed: of texts, keys, values and places.
    """

    haystack: Haystack
    length: int
    depths: int = 8
    contexts: int = 1
    seed: int = 0

    @property
    def context(self) -> int:
        """Tokens of a context.

        Raises:
            ValueError: if there is nothing left for one.
        """
        if self.length <= 2 * self.haystack.dialect.reserve:
            raise ValueError(
                f"length {self.length}: questions and answers alone may take {self.haystack.dialect.reserve} tokens; "
                f"give more than {2 * self.haystack.dialect.reserve}"
            )
        return self.length - self.haystack.dialect.reserve

    def rng(self, task: str) -> random.Random:
        """Give a source of chance for one task, the same every time.

        Args:
            task: its name.

        Returns:
            the source.
        """
        return random.Random(f"{task} {self.length} {self.seed}")

    def spread(self, num: int, rng: random.Random) -> list[float]:
        """Spread depths evenly, each somewhere within its share.

        Args:
            num: how many.
            rng: the source of where.

        Returns:
            the depths, ascending.
        """
        return [(place + rng.random()) / num for place in range(num)]
