"""Facts in plain English, for models trained on English text, in the model's own tokens."""

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
# tokens for the text around and between the values of an answer
_SLACK = 6
# largest number of questions of an item, and a value of the largest width
_TURNS, _WIDEST = 4, "999999"


@dataclass(frozen=True)
class Sentences(Dialect):
    """Codes of names, stated and asked for in sentences, without a chat template.

    Args:
        tokenizer: the model's tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase

    def encode(self, text: str, *, first: bool = False) -> tuple[int, ...]:
        """Encode with the tokenizer; special tokens are added only at the beginning of the input."""
        tokens = list(self.tokenizer(text, add_special_tokens=first, verbose=False).input_ids)
        ended = first and len(tokens) > 1 and tokens[-1] == self.tokenizer.eos_token_id
        return tuple(tokens[:-1] if ended else tokens)

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Decode with the tokenizer."""
        return str(self.tokenizer.decode(list(tokens)))

    def keys(self, num: int, rng: random.Random) -> list[str]:
        """Draw keys of two words and a number, such as calm-river-17."""
        places = rng.sample(range(len(_FIRST) * len(_SECOND) * _NUMBERS), num)
        names = [(place // _NUMBERS, place % _NUMBERS) for place in places]
        return [f"{_FIRST[pair // len(_SECOND)]}-{_SECOND[pair % len(_SECOND)]}-{number}" for pair, number in names]

    def value(self, rng: random.Random) -> str:
        """Draw a value of six digits."""
        return f"{rng.randrange(100_000, 1_000_000)}"

    def fact(self, key: str, value: str) -> str:
        """Return a sentence that gives the value of the key."""
        return f"The code of {key} is {value}.\n"

    def link(self, key: str, other: str) -> str:
        """Return a sentence that says that both keys have the same value."""
        return f"The code of {key} is the code of {other}.\n"

    def question(self, key: str, num: int = 1) -> str:
        """Return the question and the beginning of its answer."""
        if num > 1:
            return f"\n\nQuestion: What are the {num} codes of {key}?\nAnswer: The {num} codes of {key} are"
        return f"\n\nQuestion: What is the code of {key}?\nAnswer: The code of {key} is"

    def answer_size(self, answers: tuple[str, ...]) -> int:
        """Count the tokens of a short answer, plus a few spare tokens."""
        return len(self.encode(" " + ", ".join(answers))) + _SLACK

    @property
    def preamble(self) -> tuple[int, ...]:
        """An introduction that tells the model what it will be asked for."""
        return self.encode(_PREAMBLE, first=True)

    @property
    def reserve(self) -> int:
        """The tokens of four questions, plus spare tokens for names with more tokens than the longest name."""
        longest = f"{max(_FIRST, key=len)}-{max(_SECOND, key=len)}-{_NUMBERS - 1}"
        turn = len(self.encode(self.question(longest))) + self.answer_size((_WIDEST,))
        return _TURNS * (turn + turn // 4)
