"""What some models do to scores beside their scale: a cap, and sinks that take a share of the softmax."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.types import Partial


@dataclass(frozen=True)
class ScoreRule:
    """How scores become weights, beside their scale.

    score <- softcap * tanh(score / softcap), then softmax over the keys and one sink logit a head, whose share is dropped

    Source: Gemma 2 (arXiv:2408.00118) for the cap, gpt-oss (arXiv:2508.10925) for the sinks.   Differs: nothing.

    Args:
        softcap: bound of the scores; None for none.
        sinks: logit of each query head that stands for no key; None for none.
    """

    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether scores become weights as they are."""
        return self.softcap is None and self.sinks is None

    def cap(self, scores: Tensor) -> Tensor:
        """Bound scores, before any log-weight is added.

        Args:
            scores: of any shape.

        Returns:
            the bounded scores; the same tensor where there is no bound.
        """
        return capped(scores, self.softcap)

    def drop_sinks(self, part: Partial) -> Partial:
        """Give the sinks their share of attention over all keys.

        out <- out exp(lse) / (exp(lse) + exp(sink))

        Args:
            part: rows over all keys, the sinks left out.

        Returns:
            the rows and their log-sum-exp, sinks included.
        """
        if self.sinks is None:
            return part
        sinks = self.sinks.to(part.lse.dtype)[None, :, None]
        share = torch.sigmoid(part.lse - sinks)
        return Partial((part.out * share[..., None]).to(part.out.dtype), torch.logaddexp(part.lse, sinks))


PLAIN = ScoreRule()


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Bound scores smoothly.

    Args:
        scores: of any shape.
        softcap: the bound; None for none.

    Returns:
        softcap * tanh(scores / softcap); the same tensor where there is no bound.
    """
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
