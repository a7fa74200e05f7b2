"""A complete evaluation: every task, length and seed with every candidate, and the loss on continuations."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from hyperattention.bench.timing import ignore
from hyperattention.evaluation.ask import AskSettings, Reply, ask
from hyperattention.evaluation.continuation import Loss, Texts, continuation_loss
from hyperattention.evaluation.dialect import Dialect, Lines
from hyperattention.evaluation.haystack import Haystack
from hyperattention.evaluation.policies import CacheCandidate
from hyperattention.evaluation.sentences import Sentences
from hyperattention.evaluation.tasks import TASKS, check_tasks
from hyperattention.evaluation.tasks.setting import Setting
from hyperattention.files.user_text import Text
from hyperattention.reference.model import LoadedModel


@dataclass(frozen=True)
class EvaluationPlan:
    """The settings of an evaluation.

    Args:
        tasks: names of tasks.
        lengths: largest numbers of tokens of context, questions and answers together.
        depths: number of ranges of depth.
        contexts: number of contexts of each kind for each task, length and seed.
        seeds: number of seeds; a seed sets texts, keys, values and places, and the policies' draws.
        candidates: the candidates, exact attention first.
        visible: whether the question is part of the text when the cache is compressed; both by default.
        documents: number of texts for each seed whose continuation is scored; 0 for none.
        continuation: share of each such text that is read with the compressed cache.
        shown: largest number of visible questions for one context.
        rows: number of contexts, or of questions, in one batch.
        chunk: tokens of each chunk in which prompts are read, with earlier chunks already compressed; None for one chunk.

    Raises:
        ValueError: if a task is unknown, a number is not positive, or there are neither tasks nor documents.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    candidates: tuple[CacheCandidate, ...]
    depths: int = 8
    contexts: int = 1
    seeds: int = 3
    visible: tuple[bool, ...] = (False, True)
    documents: int = 8
    continuation: float = 0.25
    shown: int = 8
    rows: int = 8
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_tasks(self.tasks)
        if not self.tasks and not self.documents:
            raise ValueError("no tasks and no documents: there is nothing to evaluate; give at least one of them")
        if min(self.depths, self.contexts, self.seeds, self.rows, self.chunk or 1, *self.lengths) < 1 or not self.lengths:
            raise ValueError(f"{self.depths=}, {self.contexts=}, {self.seeds=}, {self.lengths=}: all must be positive")

    @property
    def steps(self) -> int:
        """The number of steps, each of which calls `on_step`."""
        asked = len(self.tasks) * len(self.lengths) * self.seeds
        return asked + (len(self.lengths) * self.seeds if self.documents else 0)


@dataclass(frozen=True)
class Findings:
    """The results of an evaluation.

    Args:
        replies: one for each item and candidate.
        losses: one for each text and candidate, with the length of the text.
    """

    replies: tuple[Reply, ...]
    losses: tuple[tuple[int, Loss], ...]


def dialect_of(loaded: LoadedModel) -> Dialect:
    """Choose the dialect for a model.

    Args:
        loaded: the model; one without a tokenizer is the reference model.

    Returns:
        the dialect.
    """
    return Lines() if loaded.tokenizer is None else Sentences(loaded.tokenizer)


def haystack_of(loaded: LoadedModel, text: Text) -> Haystack:
    """Make a haystack from a text, in the tokens of a model.

    Args:
        loaded: the model.
        text: the text.

    Returns:
        the haystack.
    """
    # for a byte-level model every byte is a character
    return Haystack.of(text.data.decode("latin-1") if loaded.tokenizer is None else text.words(), dialect_of(loaded))


def evaluate(
    loaded: LoadedModel, haystack: Haystack, plan: EvaluationPlan, on_step: Callable[[str], None] = ignore
) -> Findings:
    """Run an evaluation: every task and every continuation, with every candidate.

    Args:
        loaded: the model.
        haystack: the text for hidden facts and continuations.
        plan: the settings.
        on_step: called before each step with its name.

    Returns:
        the results.
    """
    replies: list[Reply] = []
    losses: list[tuple[int, Loss]] = []
    for length, seed in product(plan.lengths, range(plan.seeds)):
        setting = Setting(haystack, length, plan.depths, plan.contexts, seed)
        asking = AskSettings(
            loaded.model, haystack.dialect, plan.candidates, plan.visible, plan.shown, plan.rows, seed, plan.chunk
        )
        for task in plan.tasks:
            items = TASKS[task](setting)
            on_step(f"{task}, {length:,} tokens, seed {seed}")
            replies += ask(asking, items)
        if plan.documents:
            on_step(f"continuation, {length:,} tokens, seed {seed}")
            texts = Texts(length, max(1, int(length * plan.continuation)), plan.documents)
            losses += [(length, loss) for loss in continuation_loss(asking, haystack.tokens, texts)]
    return Findings(tuple(replies), tuple(losses))


def check(loaded: LoadedModel, haystack: Haystack, plan: EvaluationPlan) -> None:
    """Check the settings before any slow work begins.

    Args:
        loaded: the model.
        haystack: the text.
        plan: the settings.

    Raises:
        ValueError: if a length is longer than the model supports, too short for a question, or longer than the text.
    """
    if too_long := [length for length in plan.lengths if length > loaded.max_length]:
        raise ValueError(f"lengths {too_long}: {loaded.name} reads at most {loaded.max_length:,} tokens; shorten them")
    for length in plan.lengths:
        needed = max(length if plan.documents else 0, Setting(haystack, length).context)
        if len(haystack.tokens) < needed:
            raise ValueError(f"the text has {len(haystack.tokens):,} tokens, but {needed:,} are needed: give a longer text")
