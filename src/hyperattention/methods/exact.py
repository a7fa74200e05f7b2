"""Exact attention as a method: what runs below the crossover, and what the others are measured against."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hyperattention.exact import exact_attention
from hyperattention.methods.base import Approach, Cost, exact_pairs
from hyperattention.problem import Problem
from hyperattention.select.stage import LookAhead
from hyperattention.types import Partial


@dataclass(frozen=True)
class Exact(Approach):
    """Run exact attention: torch's own kernel where its output is all that is asked for."""

    @property
    def complete(self) -> bool:
        """Every key has a weight of one."""
        return True

    @property
    def looks_ahead(self) -> LookAhead:
        """No row depends on what follows it."""
        return LookAhead.NOTHING

    def attend(self, problem: Problem) -> Partial:
        """Compute exact attention and its lse, in chunks of rows."""
        position = problem.position
        end = position + 1 if problem.causal else torch.full_like(position, problem.num_keys)
        visible = problem.live_before(end)
        return exact_attention(problem.q, problem.k, problem.v, scale=problem.scale, visible=visible)

    def attend_with_error(self, problem: Problem) -> tuple[Partial, Float[Tensor, "batch heads queries"]]:
        """Compute exact attention; nothing is drawn, so that every standard error is 0."""
        partial = self.attend(problem)
        return partial, torch.zeros_like(partial.lse, requires_grad=False)

    def output(self, problem: Problem) -> Tensor:
        """Compute the output alone, with torch's fused kernel where alignment and masks allow it."""
        plain = problem.rank is None and (not problem.causal or (problem.offset == 0 and problem.spans is None))
        if not plain or not problem.num_keys or not problem.num_queries:
            return self.attend(problem).out
        return scaled_dot_product_attention(
            problem.q, problem.k, problem.v, is_causal=problem.causal, scale=problem.scale, enable_gqa=problem.group > 1
        )

    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Tell the cost for as many queries as keys."""
        pairs = exact_pairs(num_keys, is_causal)
        return Cost(pairs, 0.0, pairs, 16 * num_keys * head_dim, True)
