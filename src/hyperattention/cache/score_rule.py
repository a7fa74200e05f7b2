"""Changes of scores in some models: a softcap, and learned sinks that take a share of the softmax."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.merge import without_sinks
from hyperattention.types import Partial


@dataclass(frozen=True)
class ScoreRule:
    """The softcap and learned sinks with which scores become weights.

    score <- softcap * tanh(score / softcap), then softmax over the keys and one sink logit a head, whose share is dropped

    Source: Gemma 2 (arXiv:2408.00118) for the cap, gpt-oss (arXiv:2508.10925) for the sinks.   Differs: nothing.

    Args:
        softcap: bound of the scores; None for no bound.
        sinks: logit of each query head that belongs to no key; None for no sinks.
    """

    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is neither a softcap nor learned sinks."""
        return self.softcap is None and self.sinks is None

    def cap(self, scores: Tensor) -> Tensor:
        """Bound scores, before any log-weight is added.

        Args:
            scores: of any shape.

        Returns:
            the bounded scores; the same tensor if there is no bound.
        """
        return capped(scores, self.softcap)

    def drop_sinks(self, part: Partial) -> Partial:
        """Remove the sinks' share from attention over all keys.

        out <- out exp(lse) / (exp(lse) + exp(sink))

        Args:
            part: rows over all keys, without the sinks.

        Returns:
            the rows and their log-sum-exp, sinks included.
        """
        return part if self.sinks is None else without_sinks(part, self.sinks)


PLAIN = ScoreRule()


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Bound scores smoothly.

    Args:
        scores: of any shape.
        softcap: the bound; None for no bound.

    Returns:
        softcap * tanh(scores / softcap); the same tensor if there is no bound.
    """
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
