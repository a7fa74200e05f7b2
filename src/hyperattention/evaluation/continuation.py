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

# any seed but that of the tasks: the same documents whatever the tasks are
_ORDER = "continuation"


@dataclass(frozen=True)
class Texts:
    """Which texts are read, and how far.

    Args:
        length: tokens of each, the continuation included.
        continuation: how many of the last are read through the compressed cache, and their loss counted.
        documents: texts for each seed.
        chunk: tokens read at a time.

    Raises:
        ValueError: if nothing is left to be compressed.
    """

    length: int
    continuation: int = 1024
    documents: int = 8
    chunk: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.continuation < self.length:
            raise ValueError(
                f"a continuation of {self.continuation} tokens in texts of {self.length}: give a greater length"
            )


@dataclass(frozen=True)
class Loss:
    """Loss on the continuation of one text.

    Args:
        candidate: through whose cache.
        document: which text, a number that no two share.
        seed: of the policy's draws.
        nats: loss a token.
        added: nats a token more than with exact attention.
        memory_bytes: held by the cache for this text once its beginning was read.
        approximated: attention calls of its batch that read a compressed cache.
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
    """Loss added, over texts and seeds.

    Args:
        nats: mean nats a token more than exact attention's.
        error: standard error of that mean over texts; None for a single one.
        loss: mean loss.
        texts: how many texts.
    """

    nats: float
    error: float | None
    loss: float
    texts: int


def pieces(tokens: Sequence[int], texts: Texts, seed: int) -> dict[int, tuple[int, ...]]:
    """Cut texts that do not overlap; other seeds give others, as long as there are any.

    Args:
        tokens: the whole text.
        texts: what is wanted.
        seed: which of them.

    Returns:
        the texts by number; fewer than asked for where the whole is short.

    Raises:
        ValueError: if it is shorter than one of them.
    """
    starts = list(range(0, len(tokens) - texts.length + 1, texts.length))
    if not starts:
        raise ValueError(f"the text has {len(tokens):,} tokens and {texts.length:,} are needed: give a longer text")
    random.Random(_ORDER).shuffle(starts)
    first = seed * texts.documents
    chosen = [starts[(first + number) % len(starts)] for number in range(min(texts.documents, len(starts)))]
    return {begin // texts.length: tuple(tokens[begin : begin + texts.length]) for begin in chosen}


def continuation_loss(asking: AskSettings, tokens: Sequence[int], texts: Texts) -> Iterator[Loss]:
    """Read the beginning of texts once, compress it for every candidate, and read on: what did the rest lose?

    Args:
        asking: the model and the candidates, exact attention first.
        tokens: the whole text, in tokens.
        texts: what is read of it.

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
    """Sum the loss of what comes after the prompt, whose last logits are `last`; a mean a token comes back."""
    total = torch.zeros(rest.shape[0], dtype=torch.float64, device="cpu")
    for part in rest.to(last.device).split(chunk, 1):
        logits = torch.cat([last, (whole := read(asking.model, part, cache, keep=0))[:, :-1]], 1).float()
        total += cross_entropy(logits.transpose(1, 2), part, reduction="none").double().sum(1).cpu()
        last = whole[:, -1:]
    return total / rest.shape[1]


def added(losses: Sequence[Loss]) -> AddedLoss:
    """Pool the losses of one candidate.

    Args:
        losses: over texts and seeds; of a text that several seeds read, the mean is taken first.

    Returns:
        loss added, with its standard error.
    """
    by_text: dict[int, list[float]] = {}
    for each in losses:
        by_text.setdefault(each.document, []).append(each.added)
    means = [statistics.fmean(each) for each in by_text.values()]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
    return AddedLoss(statistics.fmean(means), error, statistics.fmean(each.nats for each in losses), len(means))
