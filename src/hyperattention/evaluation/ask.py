"""Answers to items: each context is read once, compressed by every candidate, and its questions are asked in batches."""

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
    """The output of a model for one item, with one candidate's cache.

    Args:
        item: the item.
        candidate: the candidate.
        visible: whether the question was part of the text when the cache was compressed.
        seed: seed of the policy's draws.
        outputs: the model's continuation, for each turn.
        memory_bytes: bytes of the cache for this item after the prompt was read.
        seconds: time of one token, divided by the rows of the batch.
        approximated: number of attention calls of the batch that read a compressed cache.
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
    """The settings for asking items.

    Args:
        model: the model that answers.
        dialect: the dialect of the items, with its tokens.
        candidates: the candidates whose caches are used.
        visible: whether the question is part of the text when the cache is compressed; both values use one reading.
        shown: largest number of visible questions for one context, because each needs its own compression.
        rows: number of contexts, or of questions, in one batch.
        seed: seed of every draw of a policy.
        chunk: tokens of each chunk in which prompts are read, with earlier chunks already compressed; None for one chunk.
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
    """Items that are asked in one batch: their contexts, and questions of the same lengths."""

    items: tuple[Item, ...]
    rows: tuple[int, ...]
    questions: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    @property
    def more(self) -> int:
        return sum(question.shape[1] for question in self.questions) + sum(self.sizes)


def ask(asking: AskSettings, items: Sequence[Item]) -> Iterator[Reply]:
    """Ask items with every candidate's cache.

    If the question is visible, the context and the question of the first turn, except its last token, are compressed;
    otherwise only the context is compressed. A context is read once for all candidates, unless it is read in chunks.

    Args:
        asking: the model, the candidates and the settings.
        items: the items, whose contexts have the same length.

    Yields:
        a reply for each item and candidate.
    """
    contexts = list(dict.fromkeys(item.context for item in items))
    for begin in range(0, len(contexts), asking.rows):
        some = {context: row for row, context in enumerate(contexts[begin : begin + asking.rows])}
        own = [item for item in items if item.context in some]
        with reading(asking.model) as counter:
            prompt = Prompt.of(asking.model, torch.tensor(list(some), dtype=torch.int64, device="cpu"), asking.chunk)
            # hidden questions first, because later copies of a context use the attention sums computed for it
            if False in asking.visible:
                yield from _ask_hidden(asking, prompt, _batches(own, some, asking), counter)
            if True in asking.visible:
                yield from _ask_visible(asking, prompt, _batches(_thinned(own, asking.shown), some, asking), counter)


def _thinned(items: Sequence[Item], most: int) -> list[Item]:
    """Keep at most `most` items of each context, evenly spread."""
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
