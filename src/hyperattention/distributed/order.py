"""Which positions of a sequence each rank holds."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# first position and end of consecutive tokens
Segment = tuple[int, int]


class Order(ABC):
    """How tokens are shared out, given how many each rank holds."""

    @abstractmethod
    def segments(self, lengths: Sequence[int]) -> list[list[Segment]]:
        """Return the positions that each rank holds, in the order of its rows.

        Args:
            lengths: tokens of each rank.

        Returns:
            for each rank its segments; empty ones are left out.
        """


@dataclass(frozen=True)
class Contiguous(Order):
    """Rank 0 holds the first tokens, rank 1 the next ones, and so on."""

    def segments(self, lengths: Sequence[int]) -> list[list[Segment]]:
        """Put the tokens of the ranks behind one another.

        Args:
            lengths: tokens of each rank.

        Returns:
            one segment for each rank that holds tokens.
        """
        return _cut(list(lengths), [[rank] for rank in range(len(lengths))])


@dataclass(frozen=True)
class HeadTail(Order):
    """Rank r holds piece r and piece 2 * ranks - 1 - r of the sequence, the order that balances causal ring attention.

    Of t tokens of a rank, (t + 1) // 2 are in its first piece.
    """

    def segments(self, lengths: Sequence[int]) -> list[list[Segment]]:
        """Put the first pieces behind one another, then the second ones, those of the last rank first.

        Args:
            lengths: tokens of each rank.

        Returns:
            up to two segments for each rank.
        """
        pieces = [(length + 1) // 2 for length in lengths] + [length // 2 for length in reversed(lengths)]
        return _cut(pieces, [[rank, len(pieces) - 1 - rank] for rank in range(len(lengths))])


def _cut(pieces: list[int], of_rank: list[list[int]]) -> list[list[Segment]]:
    begin = [0, *accumulate(pieces)]
    return [[(begin[at], begin[at + 1]) for at in numbers if pieces[at]] for numbers in of_rank]
