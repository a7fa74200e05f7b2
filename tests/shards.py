"""Scenarios of several ranks: what each rank runs, and what one machine gives for the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import hyperattention as ha
import hyperattention.distributed as shared
from hyperattention.methods.base import AttentionMethod
from hyperattention.select import DrawAlike

IN_ORDER = shared.Contiguous()
LOCAL = ha.Method(ha.Sinks(4), ha.Window(16), DrawAlike(24, rows=8, pooled=2), tile=16)
POOLED = shared.PooledChunks(LOCAL, chunk=64, num=24, averages=4, near=16, sinks=4, block=32)
# its budgets hold every key
ALL = shared.PooledChunks(
    ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(400), tile=16), chunk=64, num=400, averages=2, near=16, sinks=4
)


@dataclass(frozen=True)
class Scenario:
    """One call on several ranks.

    Args:
        lengths: tokens of each rank.
        method: the method.
        order: which positions each rank holds.
        causal: whether queries see only earlier keys.
        masked: whether some keys are masked.
        gather: whether keys and values are gathered.
        dtype: dtype of the tensors.
        head_dim: width of queries and keys.
    """

    lengths: tuple[int, ...]
    method: AttentionMethod = POOLED
    order: shared.Order = IN_ORDER
    causal: bool = True
    masked: bool = False
    gather: bool = False
    dtype: torch.dtype = torch.float64
    head_dim: int = 16

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values, and what outputs are multiplied by for a gradient; the same in every process."""
        draw, n = torch.Generator().manual_seed(5), sum(self.lengths)
        shapes = ((4, self.head_dim), (2, self.head_dim), (2, 8), (4, 8))
        q, k, v, slope = (
            torch.randn(2, heads, n, width, generator=draw, dtype=torch.float64).to(self.dtype) for heads, width in shapes
        )
        return q, k, v, slope

    @property
    def live(self) -> Tensor | None:
        """The key mask: the first keys of a row are masked, and scattered others."""
        if not self.masked:
            return None
        n = sum(self.lengths)
        live = torch.rand(2, n, generator=torch.Generator().manual_seed(6)) > 0.2
        live[1, : n // 3] = False
        return live

    def rows(self, rank: int) -> Tensor:
        """Positions that a rank holds."""
        segments = self.order.segments(self.lengths)[rank]
        return torch.cat([torch.arange(0), *(torch.arange(start, stop) for start, stop in segments)])


def results(result: ha.AttentionResult | shared.DistributedResult, leaves: Sequence[Tensor], slope: Tensor) -> list[Tensor]:
    """Run backward through outputs and lse; give both, and the gradients."""
    seen = result.lse.masked_fill(result.lse == -torch.inf, 0.0)
    ((result.out * slope).sum() + seen.sum()).backward()
    return [result.out.detach(), result.lse.detach(), *(x.grad for x in leaves if x.grad is not None)]


def on_rank(rank: int, mesh: DeviceMesh, scenario: Scenario, **options) -> tuple[list[Tensor], shared.Traffic]:
    """Run a scenario on this rank of the context dimension."""
    q, k, v, slope = (x[:, :, scenario.rows(rank)].contiguous() for x in scenario.tensors)
    leaves = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    live = None if scenario.live is None else scenario.live[:, scenario.rows(rank)]
    result = shared.measured_attention(
        q, k, v, scenario.causal, mesh=mesh, method=scenario.method, order=scenario.order, gather=scenario.gather,
        enable_gqa=True, key_mask=live, seed=3, layer=1, **options,
    )  # fmt: skip
    return results(result, leaves, slope), result.traffic


def on_one(scenario: Scenario, method: AttentionMethod | None = None) -> list[Tensor]:
    """Run a scenario on one machine."""
    q, k, v, slope = scenario.tensors
    leaves = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    result = ha.measured_attention(
        q, k, v, is_causal=scenario.causal, method=method or scenario.method, enable_gqa=True, key_mask=scenario.live,
        seed=3, layer=1,
    )  # fmt: skip
    return results(result, leaves, slope)
