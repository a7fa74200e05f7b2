"""The items of an evaluation: a context with hidden facts, questions, and the expected answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One question and its answers.

    Args:
        question: the text that follows the context and the earlier turns.
        answers: the expected answers; each is searched for separately in the model's continuation.
        depths: for each answer, the place of its fact in the context, 0 at the beginning and 1 at the end.
        answer_size: number of tokens that the model generates.
    """

    question: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    answer_size: int


@dataclass(frozen=True)
class Item:
    """A context and the questions about it.

    Args:
        task: name of the task.
        length: largest number of tokens of context, questions and answers together.
        context: tokens of the context.
        turns: the questions, asked one after another.
    """

    task: str
    length: int
    context: tuple[int, ...]
    turns: tuple[Turn, ...]
