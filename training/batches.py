"""Batches of training: each is a pure function of the seed, the stage and its number, in whichever process it is made."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from stages import Stage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hyperattention.reference.documents import make_document

ANSWER_WEIGHT, REPEATED, DOCUMENTS, JUMPING = 6.0, 0.25, 0.75, 0.4
_ALPHABET = b"abcdefghijklmnopqrstuvwxyz=0123456789"
_ENDLESS = 2**40

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Batches(Dataset[Batch]):
    """The batches of one stage: tokens, positions and the weight of each target.

    Args:
        texts: what sequences are cut from.
        stage: length and number of the sequences.
        max_length: positions jump up to this length.
        repeats: whether some sequences are a random string, again and again: every byte after its first copy asks for
            induction.
        seed: seed of all batches.
    """

    texts: Sequence[bytes]
    stage: Stage
    max_length: int
    repeats: bool
    seed: int

    def __getitem__(self, number: int) -> Batch:
        rng = random.Random(f"{self.seed}, {self.stage.length}, {number}")
        tokens, positions, weights = zip(*(self._sequence(rng) for _ in range(self.stage.batch)), strict=True)
        return torch.stack(tokens), torch.stack(positions), torch.stack(weights)

    def _sequence(self, rng: random.Random) -> Batch:
        length = self.stage.length
        data, weight = self._text(rng), torch.ones(length + 1)
        if self.repeats and rng.random() < REPEATED:
            size = rng.randrange(16, length // 2)
            data = bytes(rng.choices(_ALPHABET, k=size)) * (length // size + 1) + data
        elif rng.random() < DOCUMENTS:
            document = make_document(data, length + 1, round(length / rng.uniform(40, 150)), rng)
            data = document.data
            for at in document.answer_index:
                weight[at : at + document.answer_size] = ANSWER_WEIGHT
        tokens = torch.frombuffer(bytearray(data[: length + 1]), dtype=torch.uint8).long()
        return tokens, self._positions(rng), weight[1:]

    @cached_property
    def _sizes(self) -> list[int]:
        return list(accumulate(map(len, self.texts)))

    def _text(self, rng: random.Random) -> bytes:
        data = b""
        while len(data) < self.stage.length + 1:
            text = rng.choices(self.texts, cum_weights=self._sizes)[0]
            start = rng.randrange(max(1, len(text) - self.stage.length // 2))
            data += text[start : start + self.stage.length + 1] + b"\n"
        return data

    def _positions(self, rng: random.Random) -> Tensor:
        position = torch.arange(self.stage.length)
        spare = self.max_length - self.stage.length
        if spare > 0 and rng.random() < JUMPING:
            for _ in range(rng.randrange(1, 4)):
                position[rng.randrange(self.stage.length) :] += rng.randrange(spare // 3 + 1)
        return position


def long_enough(texts: Sequence[bytes], stage: Stage) -> list[bytes]:
    """The texts that a stage is cut from: a long sequence of many short files would have nothing far back to use."""
    found = [text for text in texts if len(text) >= min(stage.length // 2, 8192)]
    if not found:
        raise SystemExit(
            f"no text is long enough for sequences of {stage.length} bytes: name further folders of source code"
        )
    return found


def read_batches(batches: Batches, first: int, workers: int, pinned: bool) -> Iterator[Batch]:
    """Yield the batches from number `first` on, in order; `workers` processes make them, or this one if there are none."""
    numbers = range(first, _ENDLESS)
    return iter(DataLoader(batches, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=pinned))
