"""Documents that ask more than one kind of needle: facts asked twice, answers of 1 to 8 characters, the tasks of `eval`.

Every document is read in one pass: the right answer of a question stands in the document, and a model answers a question if
its first choice is right at every character of the answer, given all before it.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from types import MappingProxyType

import torch

from hyperattention.evaluation.dialect import Lines
from hyperattention.evaluation.haystack import Haystack
from hyperattention.evaluation.item import Item
from hyperattention.evaluation.tasks import TASKS
from hyperattention.evaluation.tasks.setting import Setting
from hyperattention.reference.samples import EvaluationSample

# lines that set or ask for a fact; their keys and values are random, so their loss does not measure language modelling
_PLANTED = re.compile(rb"#[sg]et [a-z]{3}=[0-9a-z]*\n?")
_BYTES_PER_FACT = 128
_MOST = 8
# facts asked for after a context that is full of them; chains, and keys of several values
_NUM_ASKED, _NUM_CHAINS = 200, 32
# bytes of a question with its answer
_ASKED = len("\n#get abc=1234")


@dataclass(frozen=True)
class Answer:
    """Where the answer of one question stands, how far back the fact is, and which answers it is counted with."""

    first: int
    size: int
    distance: int
    group: str


@dataclass(frozen=True)
class HarderDocument:
    data: bytes
    answers: tuple[Answer, ...]

    def sample(self) -> EvaluationSample:
        """Make the sample of a pass: one "answer" for each character, and a loss of planted tokens for the answers alone."""
        size = len(self.data)
        text = torch.arange(size, dtype=torch.int64, device="cpu") >= size // 2
        for line in _PLANTED.finditer(self.data):
            text[line.start() : line.end()] = False
        places = [(answer.first + i, answer.distance) for answer in self.answers for i in range(answer.size)]
        asked = torch.zeros(size, dtype=torch.bool, device="cpu")
        asked[[place for place, _ in places]] = True
        tokens = torch.frombuffer(bytearray(self.data), dtype=torch.uint8).long()
        return EvaluationSample(
            tokens, text[1:].clone(), int(text[1:].sum()), asked[1:].clone(),
            tuple(place for place, _ in places), tuple(distance for _, distance in places), 1,
        )  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """A fact, the place of the line that sets it, 0 to 1, and the place and the group of each question."""

    key: str
    value: str
    place: float
    questions: tuple[tuple[float, str], ...]


def weave(text: bytes, length: int, facts: Sequence[Fact]) -> HarderDocument:
    """Insert the lines of facts and questions at ends of lines, near their places; the result has `length` bytes."""
    lines = [(fact.place, number, 0, "", fact) for number, fact in enumerate(facts)]
    lines += [
        (place, number, turn + 1, group, fact)
        for number, fact in enumerate(facts)
        for turn, (place, group) in enumerate(fact.questions)
    ]
    room = sum(len(_line(fact, turn)) for _, _, turn, _, fact in lines)
    if len(text) < length or room > length:
        raise ValueError(f"{len(text)} bytes of text and {room} bytes of lines: a document of {length} needs more or fewer")
    body, whole, done, set_at, answers = text[: length - room], bytearray(), 0, {}, []
    for place, number, turn, group, fact in sorted(lines, key=lambda line: line[:3]):
        target = max(done, int(place * len(body)))
        cut = body.find(b"\n", target) + 1 or len(body)
        # a very long line is cut, as in make_document
        cut = cut if cut - target < 400 else target
        whole += body[done:cut] + _line(fact, turn)
        done, first = cut, len(whole) - len(fact.value) - 1
        if turn:
            answers.append(Answer(first, len(fact.value), first - set_at[number], group))
        else:
            set_at[number] = first
    return HarderDocument(bytes(whole + body[done:]), tuple(answers))


def _line(fact: Fact, turn: int) -> bytes:
    return f"#{'get' if turn else 'set'} {fact.key}={fact.value}\n".encode()


def _even(num: int, rng: random.Random) -> Iterator[tuple[float, float]]:
    """Draw a place and a distance for each fact; the distances are spread evenly over the possible range."""
    for number in range(num):
        distance = (number + rng.random()) / num * 0.98
        yield rng.random() * (0.99 - distance), distance


def twice(text: bytes, length: int, rng: random.Random) -> HarderDocument:
    """Ask for every fact twice; the first time at a random place between the fact and the second time."""
    num, facts = length // _BYTES_PER_FACT, []
    for key, (place, distance) in zip(Lines().keys(num, rng), _even(num, rng), strict=True):
        questions = (place + rng.random() * distance, "first time"), (place + distance, "second time")
        facts.append(Fact(key, Lines().value(rng), place, questions))
    return weave(text, length, facts)


def digits(text: bytes, length: int, rng: random.Random) -> HarderDocument:
    """Ask for values of 1 to 8 digits; the model was trained on four."""
    facts = [
        Fact(key, value, place, ((place + distance, _several(len(value), "digit")),))
        for key, value, place, distance in _of_many_sizes(length, "0123456789", rng)
    ]
    return weave(text, length, facts)


def letters(text: bytes, length: int, rng: random.Random) -> HarderDocument:
    """Ask for values of 1 to 8 letters; each letter after the first counts alone, because the model expects digits."""
    facts = [
        Fact(key, value, place, ((place + distance, ""),))
        for key, value, place, distance in _of_many_sizes(length, ascii_lowercase, rng)
    ]
    woven = weave(text, length, facts)
    answers = (
        Answer(each.first + number, 1, each.distance, "letters") for each in woven.answers for number in range(1, each.size)
    )
    return HarderDocument(woven.data, tuple(answers))


def _of_many_sizes(length: int, characters: str, rng: random.Random) -> Iterator[tuple[str, str, float, float]]:
    """Draw a key, a value of 1 to 8 characters, a place and a distance for each fact."""
    num = length // _BYTES_PER_FACT
    many = [1 + number % _MOST for number in range(num)]
    rng.shuffle(many)
    for key, size, (place, distance) in zip(Lines().keys(num, rng), many, _even(num, rng), strict=True):
        yield key, "".join(rng.choices(characters, k=size)), place, distance


def _several(num: int, word: str) -> str:
    return f"{num} {word}{'s' * (num > 1)}"


def read_together(items: Sequence[Item], group: str, rng: random.Random) -> HarderDocument:
    """Write the questions of all items of a context after it, each with its answer, in a random order."""
    whole, answers = bytearray(items[0].context), []
    turns = [turn for item in items for turn in item.turns]
    rng.shuffle(turns)
    for turn in turns:
        key = turn.question.strip().removeprefix("#get ").removesuffix("=")
        for value in turn.answers:
            fact = bytes(items[0].context).find(f"#set {key}={value}\n".encode())
            whole += turn.question.encode()
            # the value of a chain was set for another key
            back = len(whole) - (fact + len(f"#set {key}=")) if fact >= 0 else len(whole)
            answers.append(Answer(len(whole), len(value), back, group))
            whole += value.encode()
    return HarderDocument(bytes(whole), tuple(answers))


def _of_eval(task: str, depths: int, num: Callable[[int], int]) -> "Task":
    """Make a task of `hyperattention eval` with one context, in `length` bytes with `num(length)` questions after it."""

    def document(text: bytes, length: int, rng: random.Random) -> HarderDocument:
        haystack = Haystack.of(text.decode("latin-1"), Lines())
        room = _ASKED * num(length)
        setting = Setting(haystack, length - room + Lines().reserve, depths, 1, rng.randrange(10**6))
        made = read_together(TASKS[task](setting), task, rng)
        if len(made.data) > length:
            raise ValueError(f"{task}: {len(made.data)} bytes with all questions, more than {length}: leave them more room")
        return made

    return document


Task = Callable[[bytes, int, random.Random], HarderDocument]
DOCUMENTS: MappingProxyType[str, Task] = MappingProxyType(
    {
        "twice": twice,
        "digits": digits,
        "letters": letters,
        "multi-query": _of_eval("multi-query", 8, lambda length: length // (_BYTES_PER_FACT + 10)),
        "lines": _of_eval("lines", _NUM_ASKED, lambda length: _NUM_ASKED),
        "multi-value": _of_eval("multi-value", _NUM_CHAINS, lambda length: 4 * _NUM_CHAINS),
        "tracking": _of_eval("tracking", _NUM_CHAINS, lambda length: _NUM_CHAINS),
    }
)
