"""A prompt that several candidates compress."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hyperattention.evaluation.policies import CacheCandidate
from hyperattention.evaluation.reading import read
from hyperattention.evaluation.recording import fill, rows_of, start
from hyperattention.integrations.transformers.cache import HyperCache


@dataclass(frozen=True)
class Prompt:
    """Texts of one length, read once with exact attention for all candidates, or in chunks by each candidate.

    A prompt in one chunk is read with exact attention before any compression, so every policy receives the same keys,
    values and queries. In several chunks, later chunks attend to the compressed earlier chunks, so candidates cannot share
    a reading.

    Args:
        model: the model that reads.
        tokens: the texts.
        chunk: tokens of each chunk; None for one chunk.
        recorded: keys, values and queries of the texts; None if they are read in several chunks.
        last: logits after the texts; None if they are read in several chunks.
    """

    model: PreTrainedModel
    tokens: Int[Tensor, "rows tokens"]
    chunk: int | None
    recorded: HyperCache | None = None
    last: Float[Tensor, "rows 1 vocabulary"] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, tokens: Int[Tensor, "rows tokens"], chunk: int | None = None) -> "Prompt":
        """Make a prompt, and read its texts unless they are read in several chunks.

        Args:
            model: the model that reads; call this function inside `reading`.
            tokens: the texts.
            chunk: tokens of each chunk; None for one chunk.

        Returns:
            the prompt.
        """
        if chunk is not None:
            return cls(model, tokens, chunk)
        recorded = start(model)
        return cls(model, tokens, None, recorded, read(model, tokens, recorded))

    def followed(self, rows: Sequence[int], more: Int[Tensor, "_ _"]) -> "Prompt":
        """Append tokens to some rows.

        Args:
            rows: the numbers of the rows; a row may occur more than once.
            more: the tokens to append, one row for each entry of `rows`; may have no tokens.

        Returns:
            the longer prompt.
        """
        tokens = torch.cat([self.tokens[torch.tensor(rows, dtype=torch.int64, device="cpu")], more], 1)
        if self.recorded is None or self.last is None:
            return Prompt(self.model, tokens, self.chunk)
        recorded = rows_of(self.recorded, self.model, rows)
        last = (
            read(self.model, more, recorded)
            if more.shape[1]
            else self.last[torch.tensor(rows, dtype=torch.int64, device="cpu")]
        )
        return Prompt(self.model, tokens, None, recorded, last)

    def compressed(self, candidate: CacheCandidate, more: int, seed: int) -> tuple[HyperCache, Tensor]:
        """Fill and compress a candidate's cache with the prompt.

        Args:
            candidate: the candidate.
            more: number of tokens that will follow.
            seed: seed of every draw.

        Returns:
            the candidate's cache, and the logits after the prompt.
        """
        cache = candidate.cache(self.model, self.tokens.shape[1] + more, seed)
        if self.recorded is not None and self.last is not None:
            fill(cache, self.recorded)
            return cache, self.last
        *_, last = (read(self.model, part, cache) for part in self.tokens.split(self.chunk or 1, 1))
        return cache, last
