"""Exact attention as a method: it runs below the crossover, and other methods are measured against it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.exact import exact_attention
from hyperattention.fused import attend_rows, output_rows
from hyperattention.live_rows import live_rows
from hyperattention.methods.base import AttentionMethod, Cost, exact_pairs
from hyperattention.problem import Problem
from hyperattention.select.stage import LookAhead
from hyperattention.types import Partial


@dataclass(frozen=True)
class Exact(AttentionMethod):
    """Run exact attention: by torch's fused kernels if they support the call, otherwise in chunks of rows."""

    @property
    def complete(self) -> bool:
        """Every key has a weight of one."""
        return True

    @property
    def looks_ahead(self) -> LookAhead:
        """No row depends on later queries or keys."""
        return LookAhead.NOTHING

    @property
    def follows_masks(self) -> bool:
        """Keys stay in place: live keys that are contiguous are a slice."""
        return True

    def attend(self, problem: Problem) -> Partial:
        """Compute exact attention and its lse: by a fused kernel if one returns the lse, otherwise in chunks of rows."""
        parts = []
        for piece in live_rows(problem) or ():
            part = attend_rows(piece.call, piece.shift)
            if part is None:
                return _in_chunks(problem)
            parts.append(part)
        if len(parts) < 2:
            return parts[0] if parts else _in_chunks(problem)
        return Partial(torch.cat([part.out for part in parts]), torch.cat([part.lse for part in parts]))

    def attend_with_error(self, problem: Problem) -> tuple[Partial, Float[Tensor, "batch heads queries"]]:
        """Compute exact attention; there are no draws, so every standard error is 0."""
        partial = self.attend(problem)
        return partial, torch.zeros_like(partial.lse, requires_grad=False)

    def output(self, problem: Problem) -> Tensor:
        """Compute the output alone, by torch's fused kernels if they support the problem."""
        outs = []
        for piece in live_rows(problem) or ():
            out = output_rows(piece.call, piece.shift)
            if out is None:
                return self.attend(problem).out
            outs.append(out)
        if len(outs) < 2:
            return outs[0] if outs else self.attend(problem).out
        return torch.cat(outs)

    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Return the cost for as many queries as keys."""
        pairs = exact_pairs(num_keys, is_causal)
        return Cost(pairs, 0.0, pairs, 16 * num_keys * head_dim, True)


def _in_chunks(problem: Problem) -> Partial:
    """Run exact attention in chunks of rows, which supports every problem."""
    position, k, v, mask = problem.position, problem.k, problem.v, problem.key_mask
    end = position + 1 if problem.causal else torch.full_like(position, problem.num_keys)
    if mask is not None:
        # the result must not depend on padding: 0 times NaN is NaN
        k, v = (x.masked_fill(~mask[:, None, :, None], 0.0) for x in (k, v))
    return exact_attention(problem.q, k, v, scale=problem.scale, visible=problem.live_before(end), key_mask=mask)
