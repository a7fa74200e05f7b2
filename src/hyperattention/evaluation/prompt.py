"""A prompt that several candidates compress, each in its own way."""

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
    """Texts of one length, read once by exact attention for all, or in pieces by each candidate.

    In one piece a prompt is attended to exactly whoever compresses it afterwards, so every policy is shown the same keys,
    values and queries. In pieces later ones are read through what is left of earlier ones, and nothing can be shared.

    Args:
        model: who reads.
        tokens: the texts.
        chunk: tokens of a piece; None for one piece.
        recorded: what exact attention made of them; None where they come in pieces.
        last: logits after them; likewise.
    """

    model: PreTrainedModel
    tokens: Int[Tensor, "rows tokens"]
    chunk: int | None
    recorded: HyperCache | None = None
    last: Float[Tensor, "rows 1 vocabulary"] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, tokens: Int[Tensor, "rows tokens"], chunk: int | None = None) -> "Prompt":
        """Read texts, unless they come in pieces.

        Args:
            model: who reads; call within `reading`.
            tokens: the texts.
            chunk: tokens of a piece; None for one piece.

        Returns:
            the prompt.
        """
        if chunk is not None:
            return cls(model, tokens, chunk)
        recorded = start(model)
        return cls(model, tokens, None, recorded, read(model, tokens, recorded))

    def followed(self, rows: Sequence[int], more: Int[Tensor, "_ _"]) -> "Prompt":
        """Let other tokens follow in each of some rows.

        Args:
            rows: which, repeats allowed.
            more: what follows, a row each; may have no tokens.

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
        """Let a candidate read the prompt.

        Args:
            candidate: what stays of it.
            more: tokens that are to follow.
            seed: of every draw.

        Returns:
            the candidate's cache, and the logits after the prompt.
        """
        cache = candidate.cache(self.model, self.tokens.shape[1] + more, seed)
        if self.recorded is not None and self.last is not None:
            fill(cache, self.recorded)
            return cache, self.last
        *_, last = (read(self.model, part, cache) for part in self.tokens.split(self.chunk or 1, 1))
        return cache, last
