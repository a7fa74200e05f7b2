"""Reading and answering with a model and a cache."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hyperattention.integrations.transformers import CallCounter, use
from hyperattention.integrations.transformers.cache import HyperCache
from hyperattention.integrations.transformers.cache_argument import cache_argument
from hyperattention.methods.exact import Exact


@contextmanager
def reading(model: PreTrainedModel) -> Iterator[CallCounter]:
    """Prepare a model for compressed caches inside the block; all other attention is exact.

    Args:
        model: the model.

    Yields:
        the counter of attention calls.
    """
    # with a cache that drops no keys, no call is approximated, and every result reports this itself
    with torch.inference_mode(), use(model, Exact(), warn=False) as counter:
        yield counter


def read(model: PreTrainedModel, tokens: Int[Tensor, "batch tokens"], cache: HyperCache, keep: int = 1) -> Tensor:
    """Read further tokens with a model.

    Args:
        model: the model.
        tokens: the next tokens.
        cache: the cache of the earlier tokens.
        keep: number of last tokens whose logits are returned; 0 for all.

    Returns:
        the logits.
    """
    given = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": keep}
    return model(tokens.to(model.device), **given).logits


@dataclass(frozen=True)
class Replies:
    """The answers of a model.

    Args:
        turns: the generated tokens, for each turn.
        seconds: time of one token in steps of one token, divided by the rows of the batch.
    """

    turns: tuple[Int[Tensor, "batch _"], ...]
    seconds: float


def converse(
    model: PreTrainedModel, cache: HyperCache, questions: Sequence[Int[Tensor, "batch _"]], sizes: Sequence[int]
) -> Replies:
    """Ask questions one after another; the model continues greedily after each.

    Args:
        model: the model that answers.
        cache: the cache of the context.
        questions: the questions, one for each turn.
        sizes: number of tokens that the model generates in each turn.

    Returns:
        the answers.
    """
    turns, seconds, steps, said = [], 0.0, 0, []
    for question, size in zip(questions, sizes, strict=True):
        # the last token of an answer was generated but not read yet
        tokens, answer = torch.cat([*said, question.to(model.device)], 1), []
        for _ in range(size):
            began = time.perf_counter()
            said = [read(model, tokens, cache)[:, -1:].argmax(-1)]
            if tokens.shape[1] == 1:
                seconds, steps = seconds + time.perf_counter() - began, steps + tokens.shape[0]
            answer += said
            tokens = said[0]
        turns.append(torch.cat(answer, 1).cpu())
    return Replies(tuple(turns), seconds / max(1, steps))
