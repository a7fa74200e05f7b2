"""Contexts of an exact length, with facts at given depths of ordinary text."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hyperattention.evaluation.dialect import Dialect

# largest distance, in tokens, by which a fact is moved to the next end of a line or sentence
_FARTHEST = 400


@dataclass(frozen=True)
class Haystack:
    """Ordinary text in which facts are hidden.

    Args:
        dialect: the dialect that made the tokens.
        tokens: the tokens of the text.
        ends: for each token, whether a line or sentence ends with it.
    """

    dialect: Dialect
    tokens: tuple[int, ...]
    ends: tuple[bool, ...]

    @classmethod
    def of(cls, text: str, dialect: Dialect) -> "Haystack":
        """Make a haystack from a text.

        Args:
            text: the text.
            dialect: the dialect that encodes the text.

        Returns:
            the haystack.
        """
        tokens = dialect.encode(text)
        lines, sentences = (
            {token for token in set(tokens) if dialect.decode((token,)).endswith(end)} for end in ("\n", ".")
        )
        ends = lines or sentences
        return cls(dialect, tokens, tuple(token in ends for token in tokens))

    def piece(self, length: int, rng: random.Random) -> "Haystack":
        """Cut a piece at a random place.

        Args:
            length: number of tokens of the piece.
            rng: the random generator for the place.

        Returns:
            the piece.

        Raises:
            ValueError: if the text is too short.
        """
        if len(self.tokens) < length:
            raise ValueError(f"the text has {len(self.tokens):,} tokens, but {length:,} are needed: give a longer text")
        first = rng.randrange(len(self.tokens) - length + 1)
        return Haystack(self.dialect, self.tokens[first : first + length], self.ends[first : first + length])

    def end_of_line(self, place: int) -> int:
        """Find the next end of a line or sentence.

        Args:
            place: the token where the search begins.

        Returns:
            the place after that end; `place` itself if no end is near.
        """
        nearest = range(max(0, place - 1), min(place + _FARTHEST, len(self.ends)))
        return next((i + 1 for i in nearest if self.ends[i]), place) if place else 0


def hide(facts: Sequence[tuple[float, str]], length: int, haystack: Haystack, rng: random.Random) -> tuple[int, ...]:
    """Insert facts into a piece of text, each after the end of a line near its depth.

    Args:
        facts: the depth of each fact, 0 to 1, and its words.
        length: number of tokens of the result.
        haystack: the text.
        rng: the random generator for the piece.

    Returns:
        exactly `length` tokens.

    Raises:
        ValueError: if the facts do not fit, or the text is too short.
    """
    dialect = haystack.dialect
    parts = [(depth, dialect.encode(words)) for depth, words in sorted(facts)]
    whole = list(dialect.preamble)
    left = len(whole) + sum(len(words) for _, words in parts)
    if left > length:
        raise ValueError(f"{len(parts)} facts need {left} tokens, but the context has {length}: give a greater length")
    straw, done = haystack.piece(length - left, rng), 0
    for depth, words in parts:
        target = min(max(done, done + int(depth * length) - len(whole)), len(straw.tokens))
        cut = straw.end_of_line(target)
        whole += [*straw.tokens[done:cut], *words]
        done = cut
    return (*whole, *straw.tokens[done:])
