"""How facts are told and asked for: in set and get lines for the reference model, in sentences for others."""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Dialect(ABC):
    """The words of a task, and the tokens of words."""

    @abstractmethod
    def encode(self, text: str, *, first: bool = False) -> tuple[int, ...]:
        """Turn text into tokens.

        Args:
            text: the text.
            first: whether it begins the input, where models may want a token of their own.

        Returns:
            the tokens.
        """

    @abstractmethod
    def decode(self, tokens: tuple[int, ...]) -> str:
        """Turn tokens into text.

        Args:
            tokens: the tokens.

        Returns:
            the text.
        """

    @abstractmethod
    def keys(self, num: int, rng: random.Random) -> list[str]:
        """Draw keys that differ.

        Args:
            num: how many.
            rng: the source.

        Returns:
            the keys.
        """

    @abstractmethod
    def value(self, rng: random.Random) -> str:
        """Draw a value that nothing but the fact tells.

        Args:
            rng: the source.

        Returns:
            the value.
        """

    @abstractmethod
    def fact(self, key: str, value: str) -> str:
        """Tell a fact.

        Args:
            key: of what.
            value: what it is.

        Returns:
            a line of its own.
        """

    @abstractmethod
    def link(self, key: str, other: str) -> str:
        """Tell that a key has the value of another.

        Args:
            key: of what.
            other: which has the value.

        Returns:
            a line of its own.
        """

    @abstractmethod
    def question(self, key: str, num: int = 1) -> str:
        """Ask for the value of a key, so that the value is what comes next.

        Args:
            key: of what.
            num: how many values it was given.

        Returns:
            the question.
        """

    @abstractmethod
    def answer_size(self, answers: tuple[str, ...]) -> int:
        """Return how many tokens of the model's continuation may hold the answers.

        Args:
            answers: the answers.

        Returns:
            a number of tokens.
        """

    @property
    @abstractmethod
    def preamble(self) -> tuple[int, ...]:
        """Tokens that every context begins with: what the reader is to look out for."""

    @property
    @abstractmethod
    def reserve(self) -> int:
        """Tokens of an item that are left for its questions and answers."""


@dataclass(frozen=True)
class Lines(Dialect):
    """What the reference model was trained on: bytes, and lines that set three letters to four digits and get them."""

    def encode(self, text: str, *, first: bool = False) -> tuple[int, ...]:
        """Take the bytes; one character is one byte."""
        return tuple(text.encode("latin-1"))

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Take every byte for a character."""
        return bytes(tokens).decode("latin-1")

    def keys(self, num: int, rng: random.Random) -> list[str]:
        """Draw three letters."""
        return rng.sample([a + b + c for a in _LETTERS for b in _LETTERS for c in _LETTERS], num)

    def value(self, rng: random.Random) -> str:
        """Draw four digits."""
        return f"{rng.randrange(10_000):04d}"

    def fact(self, key: str, value: str) -> str:
        """Set it."""
        return f"#set {key}={value}\n"

    def link(self, key: str, other: str) -> str:
        """Set it to the other; the reference model never saw that."""
        return f"#set {key}={other}\n"

    def question(self, key: str, num: int = 1) -> str:
        """Get it, however often it was set."""
        return f"\n#get {key}="

    def answer_size(self, answers: tuple[str, ...]) -> int:
        """Count digits, and what stands between several answers."""
        return sum(map(len, answers)) + len(answers) - 1

    @property
    def preamble(self) -> tuple[int, ...]:
        """The reference model needs none."""
        return ()

    @property
    def reserve(self) -> int:
        """Enough for four lines."""
        return 64
