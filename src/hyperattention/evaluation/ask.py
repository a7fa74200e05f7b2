"""How items are answered: contexts are read once for all, compressed by each candidate, and asked about in batches."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hyperattention.evaluation.dialect import Dialect
from hyperattention.evaluation.item import Item
from hyperattention.evaluation.policies import CacheCandidate
from hyperattention.evaluation.prompt import Prompt
from hyperattention.evaluation.reading import converse, reading
from hyperattention.integrations.transformers import CallCounter
from hyperattention.integrations.transformers.cache import HyperCache


@dataclass(frozen=True)
class Reply:
    """What a model said to an item through a cache.

    Args:
        item: what was asked.
        candidate: whose cache.
        visible: whether the question was there when the cache was compressed.
        seed: of the policy's draws.
        outputs: what the model continued with, for each turn.
        memory_bytes: held by the cache for this item, once the prompt was read.
        seconds: of a token, its share of the batch.
        approximated: attention calls of its batch that read a compressed cache.
    """

    item: Item
    candidate: CacheCandidate
    visible: bool
    seed: int
    outputs: tuple[str, ...]
    memory_bytes: int
    seconds: float
    approximated: int


@dataclass(frozen=True)
class AskSettings:
    """How items are asked.

    Args:
        model: who answers.
        dialect: whose tokens.
        candidates: through whose caches.
        visible: whether the question is there when the cache is compressed; both are asked from one reading.
        shown: most questions of one context that are asked visibly, for each needs a compression of its own.
        rows: contexts read, or questions asked, at a time.
        seed: of every draw of a policy.
        chunk: tokens of a piece in which prompts are read, through what is left of earlier ones; None for all at once.
    """

    model: PreTrainedModel
    dialect: Dialect
    candidates: tuple[CacheCandidate, ...]
    visible: tuple[bool, ...] = (False, True)
    shown: int = 8
    rows: int = 8
    seed: int = 0
    chunk: int | None = None


@dataclass(frozen=True)
class _Batch:
    """Items that are asked together: their contexts, and questions of the same sizes."""

    items: tuple[Item, ...]
    rows: tuple[int, ...]
    questions: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    @property
    def more(self) -> int:
        return sum(question.shape[1] for question in self.questions) + sum(self.sizes)


def ask(asking: AskSettings, items: Sequence[Item]) -> Iterator[Reply]:
    """Ask items through every candidate's cache.

    With the question visible, that of the first turn is part of what is compressed, all but its last token; otherwise the
    context alone is. A context is read once for all of them, unless it comes in pieces.

    Args:
        asking: who is asked, and how.
        items: with contexts of one length.

    Yields:
        a reply for each item and candidate.
    """
    contexts = list(dict.fromkeys(item.context for item in items))
    for begin in range(0, len(contexts), asking.rows):
        some = {context: row for row, context in enumerate(contexts[begin : begin + asking.rows])}
        own = [item for item in items if item.context in some]
        with reading(asking.model) as counter:
            prompt = Prompt.of(asking.model, torch.tensor(list(some), dtype=torch.int64, device="cpu"), asking.chunk)
            # hidden first: what it works out for a context serves every copy of it
            if False in asking.visible:
                yield from _ask_hidden(asking, prompt, _batches(own, some, asking), counter)
            if True in asking.visible:
                yield from _ask_visible(asking, prompt, _batches(_thinned(own, asking.shown), some, asking), counter)


def _thinned(items: Sequence[Item], most: int) -> list[Item]:
    """Keep at most so many items of a context, evenly spread."""
    groups: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(item.context, []).append(item)
    return [
        group[number * len(group) // min(most, len(group))]
        for group in groups.values()
        for number in range(min(most, len(group)))
    ]


def _batches(items: Sequence[Item], place: dict[tuple[int, ...], int], asking: AskSettings) -> list[_Batch]:
    groups: dict[tuple[int, ...], list[tuple[Item, list[tuple[int, ...]]]]] = {}
    for item in items:
        asked = [asking.dialect.encode(turn.question) for turn in item.turns]
        groups.setdefault(tuple(map(len, asked)), []).append((item, asked))
    batches = []
    for group in groups.values():
        for begin in range(0, len(group), asking.rows):
            some = tuple(item for item, _ in group[begin : begin + asking.rows])
            turns = zip(*(asked for _, asked in group[begin : begin + asking.rows]), strict=True)
            questions = tuple(torch.tensor(turn, dtype=torch.int64, device="cpu") for turn in turns)
            sizes = tuple(max(turn.answer_size for turn in each) for each in zip(*(x.turns for x in some), strict=True))
            batches.append(_Batch(some, tuple(place[item.context] for item in some), questions, sizes))
    return batches


def _ask_hidden(asking: AskSettings, prompt: Prompt, batches: Sequence[_Batch], counter: CallCounter) -> Iterator[Reply]:
    more = max(batch.more for batch in batches)
    for candidate in asking.candidates:
        whole, _ = prompt.compressed(candidate, more, asking.seed)
        for number, batch in enumerate(batches):
            cache = whole if number == len(batches) - 1 else copy.deepcopy(whole)
            cache.batch_select_indices(torch.tensor(batch.rows, dtype=torch.int64, device="cpu"))
            yield from _ask_batch(asking, cache, candidate, batch, (False, counter))


def _ask_visible(asking: AskSettings, prompt: Prompt, batches: Sequence[_Batch], counter: CallCounter) -> Iterator[Reply]:
    for batch in batches:
        first = batch.questions[0]
        shown = prompt.followed(batch.rows, first[:, :-1])
        left = _Batch(batch.items, batch.rows, (first[:, -1:], *batch.questions[1:]), batch.sizes)
        for candidate in asking.candidates:
            cache, _ = shown.compressed(candidate, left.more, asking.seed)
            yield from _ask_batch(asking, cache, candidate, left, (True, counter))


def _ask_batch(
    asking: AskSettings, cache: HyperCache, candidate: CacheCandidate, batch: _Batch, kind: tuple[bool, CallCounter]
) -> Iterator[Reply]:
    visible, counter = kind
    before, memory = counter.counts.approximated, cache.memory_bytes // len(batch.items)
    said = converse(asking.model, cache, batch.questions, batch.sizes)
    approximated = counter.counts.approximated - before
    for row, item in enumerate(batch.items):
        outputs = tuple(asking.dialect.decode(tuple(turn[row].tolist())) for turn in said.turns)
        yield Reply(item, candidate, visible, asking.seed, outputs, memory, said.seconds, approximated)
