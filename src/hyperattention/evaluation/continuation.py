"""Loss on the continuation of a text whose beginning was compressed."""

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hyperattention.evaluation.ask import AskSettings
from hyperattention.evaluation.policies import CacheCandidate
from hyperattention.evaluation.prompt import Prompt
from hyperattention.evaluation.reading import read, reading
from hyperattention.integrations.transformers.cache import HyperCache

# a seed that does not depend on the tasks, so the documents are the same for any tasks
_ORDER = "continuation"


@dataclass(frozen=True)
class Texts:
    """The number and lengths of the texts.

    Args:
        length: tokens of each text, the continuation included.
        continuation: number of last tokens that are read with the compressed cache, and whose loss is measured.
        documents: number of texts for each seed.
        chunk: tokens read at a time.

    Raises:
        ValueError: if no tokens are left to be compressed.
    """

    length: int
    continuation: int = 1024
    documents: int = 8
    chunk: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.continuation < self.length:
            raise ValueError(
                f"a continuation of {self.continuation} tokens in texts of {self.length} tokens: give a greater length"
            )


@dataclass(frozen=True)
class Loss:
    """Loss on the continuation of one text.

    Args:
        candidate: the candidate whose cache was used.
        document: the number of the text, unique among the texts.
        seed: seed of the policy's draws.
        nats: loss in nats a token.
        added: loss minus the loss with exact attention, in nats a token.
        memory_bytes: bytes of the cache for this text after its beginning was read.
        approximated: number of attention calls of the batch that read a compressed cache.
    """

    candidate: CacheCandidate
    document: int
    seed: int
    nats: float
    added: float
    memory_bytes: int
    approximated: int


@dataclass(frozen=True)
class AddedLoss:
    """The added loss, over texts and seeds.

    Args:
        nats: mean added loss, in nats a token.
        error: standard error of that mean over texts; None for a single text.
        loss: mean loss, in nats a token.
        texts: number of texts.
    """

    nats: float
    error: float | None
    loss: float
    texts: int


def pieces(tokens: Sequence[int], texts: Texts, seed: int) -> dict[int, tuple[int, ...]]:
    """Cut texts that do not overlap; other seeds give other texts, as long as the source has enough.

    Args:
        tokens: all tokens of the source.
        texts: the number and lengths of the texts.
        seed: selects the texts.

    Returns:
        the texts by number; fewer than `texts.documents` if the source is short.

    Raises:
        ValueError: if the source is shorter than one text.
    """
    starts = list(range(0, len(tokens) - texts.length + 1, texts.length))
    if not starts:
        raise ValueError(f"the text has {len(tokens):,} tokens, but {texts.length:,} are needed: give a longer text")
    random.Random(_ORDER).shuffle(starts)
    first = seed * texts.documents
    chosen = [starts[(first + number) % len(starts)] for number in range(min(texts.documents, len(starts)))]
    return {begin // texts.length: tuple(tokens[begin : begin + texts.length]) for begin in chosen}


def continuation_loss(asking: AskSettings, tokens: Sequence[int], texts: Texts) -> Iterator[Loss]:
    """Measure the loss on the continuation of texts: read each beginning once, compress it for every candidate, read on.

    Args:
        asking: the model and the candidates, exact attention first.
        tokens: all tokens of the source.
        texts: the number and lengths of the texts.

    Yields:
        a loss for each text and candidate.
    """
    chosen = pieces(tokens, texts, asking.seed)
    numbers, begin = list(chosen), texts.length - texts.continuation
    for first in range(0, len(numbers), asking.rows):
        some = numbers[first : first + asking.rows]
        rows = torch.tensor([chosen[number] for number in some], dtype=torch.int64, device="cpu")
        with reading(asking.model) as counter:
            prompt, exact = Prompt.of(asking.model, rows[:, :begin], asking.chunk), None
            for candidate in asking.candidates:
                cache, last = prompt.compressed(candidate, texts.continuation, asking.seed)
                memory, before = cache.memory_bytes // len(some), counter.counts.approximated
                nats = _read_on(asking, cache, rows[:, begin:], last, texts.chunk)
                exact = nats if exact is None else exact
                approximated = counter.counts.approximated - before
                for number, own, base in zip(some, nats.tolist(), exact.tolist(), strict=True):
                    yield Loss(candidate, number, asking.seed, own, own - base, memory, approximated)


def _read_on(asking: AskSettings, cache: HyperCache, rest: Tensor, last: Tensor, chunk: int) -> Tensor:
    """Return the mean loss a token of the tokens after the prompt; `last` are the last logits of the prompt."""
    total = torch.zeros(rest.shape[0], dtype=torch.float64, device="cpu")
    for part in rest.to(last.device).split(chunk, 1):
        logits = torch.cat([last, (whole := read(asking.model, part, cache, keep=0))[:, :-1]], 1).float()
        total += cross_entropy(logits.transpose(1, 2), part, reduction="none").double().sum(1).cpu()
        last = whole[:, -1:]
    return total / rest.shape[1]


def added(losses: Sequence[Loss]) -> AddedLoss:
    """Pool the losses of one candidate.

    Args:
        losses: the losses over texts and seeds; losses of one text with several seeds are averaged first.

    Returns:
        the added loss, with its standard error.
    """
    by_text: dict[int, list[float]] = {}
    for each in losses:
        by_text.setdefault(each.document, []).append(each.added)
    means = [statistics.fmean(each) for each in by_text.values()]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
    return AddedLoss(statistics.fmean(means), error, statistics.fmean(each.nats for each in losses), len(means))
