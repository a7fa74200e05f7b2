"""Samples: token sequences with the places where loss is counted and the places of answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hyperattention.reference.documents import Document
from hyperattention.reference.model import LoadedModel

# lines that set or ask for a fact; their keys and digits are random, so their loss does not measure language modelling
_PLANTED = re.compile(rb"#[sg]et [a-z]{3}=[0-9]{4}\n")


@dataclass(frozen=True)
class EvaluationSample:
    """One sequence for the evaluation of a model.

    Args:
        tokens: the sequence.
        counted: for each token except the first, whether its loss counts: ordinary text of the second half.
        num_bytes: bytes of text of the counted tokens.
        planted: for each token except the first, whether it is in a line of the second half that sets or asks for a fact.
        answer_index: position of the first digit of each answer.
        answer_distance: for each answer, the distance in tokens to the digits that set it.
        answer_size: number of digits of each answer.
    """

    tokens: Int[Tensor, " tokens"]
    counted: Bool[Tensor, " targets"]
    num_bytes: int
    planted: Bool[Tensor, " targets"]
    answer_index: tuple[int, ...] = ()
    answer_distance: tuple[int, ...] = ()
    answer_size: int = 0


def samples_of_documents(documents: Sequence[Document]) -> tuple[EvaluationSample, ...]:
    """Make samples for a byte-level model.

    Args:
        documents: documents with facts.

    Returns:
        one sample for each document.
    """
    return tuple(_sample_of(document) for document in documents)


def _sample_of(document: Document) -> EvaluationSample:
    size = len(document.data)
    counted = torch.arange(size, dtype=torch.int64, device="cpu") >= size // 2
    for line in _PLANTED.finditer(document.data):
        counted[line.start() : line.end()] = False
    second_half, counted = (torch.arange(size, dtype=torch.int64, device="cpu") >= size // 2)[1:], counted[1:].clone()
    return EvaluationSample(
        torch.frombuffer(bytearray(document.data), dtype=torch.uint8).long(),
        counted,
        int(counted.sum()),
        second_half & ~counted,
        document.answer_index,
        document.answer_distance,
        document.answer_size,
    )


def tokens_of_text(text: str, loaded: LoadedModel) -> Int[Tensor, " tokens"]:
    """Encode a text in the tokens of a user's model.

    Args:
        text: the text.
        loaded: the model and its tokenizer.

    Returns:
        all tokens of the text.

    Raises:
        ValueError: if the model has no tokenizer.
    """
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.name} has no tokenizer for text: give documents of bytes to `samples_of_documents`")
    return torch.tensor(loaded.tokenizer(text, verbose=False).input_ids, dtype=torch.int64, device="cpu")


def samples_of_text(text: str, loaded: LoadedModel, length: int, count: int) -> tuple[EvaluationSample, ...]:
    """Cut a text into samples for a user's model, without questions, because the model was not trained to answer them.

    Args:
        text: the text.
        loaded: the model and its tokenizer.
        length: tokens of each sample.
        count: number of samples, from the beginning of the text; a short text gives fewer.

    Returns:
        at least one sample.

    Raises:
        ValueError: if the text has fewer tokens than one sample.
    """
    tokens = tokens_of_text(text, loaded)
    if len(tokens) < length:
        raise ValueError(f"the text has {len(tokens)} tokens of {loaded.name}, but {length} are needed: give a longer text")
    samples = []
    for start in range(0, min(count * length, len(tokens) - length + 1), length):
        piece = tokens[start : start + length]
        counted = torch.arange(1, length, dtype=torch.int64, device="cpu") >= length // 2
        samples.append(
            EvaluationSample(piece, counted, max(1, _count_bytes(piece[1:][counted], loaded)), torch.zeros_like(counted))
        )
    return tuple(samples)


def _count_bytes(tokens: Tensor, loaded: LoadedModel) -> int:
    text = "" if loaded.tokenizer is None else loaded.tokenizer.decode(tokens.tolist())
    return len(str(text).encode(errors="replace"))
