"""The form of facts and questions: set and get lines for the reference model, sentences for other models."""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Dialect(ABC):
    """The wording of facts and questions, and their tokens."""

    @abstractmethod
    def encode(self, text: str, *, first: bool = False) -> tuple[int, ...]:
        """Encode text as tokens.

        Args:
            text: the text.
            first: whether the text begins the input, where some models need a special token.

        Returns:
            the tokens.
        """

    @abstractmethod
    def decode(self, tokens: tuple[int, ...]) -> str:
        """Decode tokens to text.

        Args:
            tokens: the tokens.

        Returns:
            the text.
        """

    @abstractmethod
    def keys(self, num: int, rng: random.Random) -> list[str]:
        """Draw different keys.

        Args:
            num: number of keys.
            rng: the random generator.

        Returns:
            the keys.
        """

    @abstractmethod
    def value(self, rng: random.Random) -> str:
        """Draw a random value, which a model can only know from the fact.

        Args:
            rng: the random generator.

        Returns:
            the value.
        """

    @abstractmethod
    def fact(self, key: str, value: str) -> str:
        """Write the fact that a key has a value.

        Args:
            key: the key.
            value: the value.

        Returns:
            the fact as one line.
        """

    @abstractmethod
    def link(self, key: str, other: str) -> str:
        """Write the fact that a key has the value of another key.

        Args:
            key: the key.
            other: the other key.

        Returns:
            the fact as one line.
        """

    @abstractmethod
    def question(self, key: str, num: int = 1) -> str:
        """Ask for the value of a key, so that the value is the correct continuation.

        Args:
            key: the key.
            num: number of values of the key.

        Returns:
            the question.
        """

    @abstractmethod
    def answer_size(self, answers: tuple[str, ...]) -> int:
        """Return the number of tokens to generate for the answers.

        Args:
            answers: the answers.

        Returns:
            the number of tokens.
        """

    @property
    @abstractmethod
    def preamble(self) -> tuple[int, ...]:
        """The first tokens of every context, which tell the model what it will be asked for."""

    @property
    @abstractmethod
    def reserve(self) -> int:
        """The number of tokens of an item that are reserved for its questions and answers."""


@dataclass(frozen=True)
class Lines(Dialect):
    """The dialect of the reference model: bytes, with lines that set a key of three letters to four digits and get it."""

    def encode(self, text: str, *, first: bool = False) -> tuple[int, ...]:
        """Return the bytes of the text; one character is one byte."""
        return tuple(text.encode("latin-1"))

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Return the text; one byte is one character."""
        return bytes(tokens).decode("latin-1")

    def keys(self, num: int, rng: random.Random) -> list[str]:
        """Draw keys of three letters."""
        return rng.sample([a + b + c for a in _LETTERS for b in _LETTERS for c in _LETTERS], num)

    def value(self, rng: random.Random) -> str:
        """Draw a value of four digits."""
        return f"{rng.randrange(10_000):04d}"

    def fact(self, key: str, value: str) -> str:
        """Return a line that sets the key to the value."""
        return f"#set {key}={value}\n"

    def link(self, key: str, other: str) -> str:
        """Return a line that sets the key to the other key; the training of the reference model had no such lines."""
        return f"#set {key}={other}\n"

    def question(self, key: str, num: int = 1) -> str:
        """Return a line that gets the key; the line does not depend on `num`."""
        return f"\n#get {key}="

    def answer_size(self, answers: tuple[str, ...]) -> int:
        """Count the characters of the answers and of the separators between them."""
        return sum(map(len, answers)) + len(answers) - 1

    @property
    def preamble(self) -> tuple[int, ...]:
        """Empty: the reference model needs no preamble."""
        return ()

    @property
    def reserve(self) -> int:
        """The tokens of four lines."""
        return 64
