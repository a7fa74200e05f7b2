"""What is asked: a context with something hidden in it, questions, and the answers expected."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One question and its answers.

    Args:
        question: text that is fed after the context, and after the turns before.
        answers: what must be found in the model's continuation, each for itself.
        answer_size: tokens that the model may continue with.
    """

    question: str
    answers: tuple[str, ...]
    answer_size: int


@dataclass(frozen=True)
class Item:
    """A context and what is asked about it.

    Args:
        task: name of the task.
        context: tokens of the context.
        turns: what is asked, one after another.
        depth: where what is asked for lies, 0 at the beginning of the context and 1 at its end.
    """

    task: str
    context: tuple[int, ...]
    turns: tuple[Turn, ...]
    depth: float

    @property
    def length(self) -> int:
        """Tokens of the context."""
        return len(self.context)
