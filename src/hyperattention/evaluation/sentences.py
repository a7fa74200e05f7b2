"""Facts in plain English, for models that were taught to follow it, with their own tokens."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hyperattention.evaluation.dialect import Dialect

_FIRST = (
    *("amber", "bitter", "calm", "distant", "early", "faint", "gentle", "hollow"),
    *("icy", "jolly", "keen", "lively", "modest", "narrow", "olive", "patient"),
    *("quiet", "rapid", "silent", "tender", "upper", "vivid", "wooden", "yellow"),
)
_SECOND = (
    *("anchor", "bridge", "castle", "desert", "engine", "forest", "garden", "harbor"),
    *("island", "jacket", "kettle", "lamp", "meadow", "needle", "orchard", "pebble"),
    *("quarry", "river", "saddle", "temple", "umbrella", "valley", "window", "yard"),
)
_NUMBERS = 100
_PREAMBLE = (
    "Below is a long text. Here and there a line in it tells the code of a name. Remember these codes: you will be asked "
    "for them at the end.\n\n"
)
# what may stand around and between the values of an answer
_SLACK = 6
# most questions of an item, and a value as wide as any
_TURNS, _WIDEST = 4, "999999"


@dataclass(frozen=True)
class Sentences(Dialect):
    """Codes of names, told and asked for in sentences; nothing of a chat template is added.

    Args:
        tokenizer: the model's.
    """

    tokenizer: PreTrainedTokenizerBase

    def encode(self, text: str, *, first: bool = False) -> tuple[int, ...]:
        """Ask the tokenizer, which adds what the input begins with only there."""
        tokens = list(self.tokenizer(text, add_special_tokens=first, verbose=False).input_ids)
        ended = first and len(tokens) > 1 and tokens[-1] == self.tokenizer.eos_token_id
        return tuple(tokens[:-1] if ended else tokens)

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Ask the tokenizer."""
        return str(self.tokenizer.decode(list(tokens)))

    def keys(self, num: int, rng: random.Random) -> list[str]:
        """Draw two words and a number, such as calm-river-17."""
        places = rng.sample(range(len(_FIRST) * len(_SECOND) * _NUMBERS), num)
        names = [(place // _NUMBERS, place % _NUMBERS) for place in places]
        return [f"{_FIRST[pair // len(_SECOND)]}-{_SECOND[pair % len(_SECOND)]}-{number}" for pair, number in names]

    def value(self, rng: random.Random) -> str:
        """Draw six digits."""
        return f"{rng.randrange(100_000, 1_000_000)}"

    def fact(self, key: str, value: str) -> str:
        """Say so."""
        return f"The code of {key} is {value}.\n"

    def link(self, key: str, other: str) -> str:
        """Say so."""
        return f"The code of {key} is the code of {other}.\n"

    def question(self, key: str, num: int = 1) -> str:
        """Ask, and begin to answer."""
        if num > 1:
            return f"\n\nQuestion: What are the {num} codes of {key}?\nAnswer: The {num} codes of {key} are"
        return f"\n\nQuestion: What is the code of {key}?\nAnswer: The code of {key} is"

    def answer_size(self, answers: tuple[str, ...]) -> int:
        """Count the tokens of a plain answer, and some more."""
        return len(self.encode(" " + ", ".join(answers))) + _SLACK

    @property
    def preamble(self) -> tuple[int, ...]:
        """Say what will be asked."""
        return self.encode(_PREAMBLE, first=True)

    @property
    def reserve(self) -> int:
        """Enough for four questions, with some to spare for names of more tokens than the longest name has."""
        longest = f"{max(_FIRST, key=len)}-{max(_SECOND, key=len)}-{_NUMBERS - 1}"
        turn = len(self.encode(self.question(longest))) + self.answer_size((_WIDEST,))
        return _TURNS * (turn + turn // 4)
