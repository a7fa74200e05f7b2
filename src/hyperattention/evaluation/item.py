"""What is asked: a context with something hidden in it, questions, and the answers expected."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One question and its answers.

    Args:
        question: text that is fed after the context, and after the turns before.
        answers: what must be found in the model's continuation, each for itself.
        depths: for each answer, where in the context it was told, 0 at the beginning and 1 at the end.
        answer_size: tokens that the model may continue with.
    """

    question: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    answer_size: int


@dataclass(frozen=True)
class Item:
    """A context and what is asked about it.

    Args:
        task: name of the task.
        length: tokens that context, questions and answers may take together.
        context: tokens of the context.
        turns: what is asked, one after another.
    """

    task: str
    length: int
    context: tuple[int, ...]
    turns: tuple[Turn, ...]
