"""The exchange of one call, forward and backward: one node of the graph, so that ranks always take part together."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyperattention.distributed.group import Group
from hyperattention.distributed.plan import Plan, Way
from hyperattention.inputs import autocast_device
from hyperattention.methods.pooled_chunks import hidden
from hyperattention.methods.pooled_reader import Reader, near_route
from hyperattention.pooled.choose import choose
from hyperattention.pooled.pool import Choice, Near, Shard
from hyperattention.pooled.route import Route
from hyperattention.problem import Problem
from hyperattention.types import Partial


@dataclass(frozen=True)
class Exchange:
    """One call, once all ranks have agreed.

    Args:
        group: the ranks.
        plan: who computes what.
        way: how the method runs.
        problem: this rank's tokens and the numbers of the call; `key_mask` is that of this rank's keys.
    """

    group: Group
    plan: Plan
    way: Way
    problem: Problem

    def run(self) -> Partial:
        """Compute the output of this rank's tokens, with a gradient if one is wanted."""
        problem = self.problem
        return Partial(*_Exchanged.apply(problem.q, problem.k, problem.v, self))

    def read(self, q: Tensor, kv: Tensor) -> "_Read":
        """Choose the keys of the pools, and bring all keys that this rank reads here."""
        group, layout = self.group, self.plan.layout
        live = None
        if self.problem.key_mask is not None:
            live = self.plan.align(group, self.problem.key_mask[:, None, :, None], "key mask").x[:, 0, :, 0]
            kv = hidden(kv, live)
        rows, shape = kv.flatten(0, 2), (*kv.shape[:2], -1, kv.shape[3])
        route = near_route(group, layout, kv.shape[0] * kv.shape[1], group.device)
        near, near_live = group.move(route, rows).view(shape), None
        if live is not None:
            masks = near_route(group, layout, len(live), group.device)
            masks = replace(masks, purpose="key mask")
            near_live = group.move(masks, live.reshape(-1, 1)).view(len(live), -1)
        choice, pool = None, None
        if self.way.sizes is not None and layout.drawing:
            problem = self.problem
            before = None if live is None else self._live_before(live)
            numbers = problem.scale, problem.seed, problem.layer, problem.head_index
            shard = Shard(q, kv[..., : q.shape[3]], live, before, *numbers)
            choice = choose(group, layout, shard, Near(near[..., : q.shape[3]], near_live), self.way.sizes)
            pool = group.move(choice.route, rows).view(shape)
        return _Read(near, pool, near_live, route, choice)

    def _live_before(self, live: Bool[Tensor, "batch keys"]) -> Int[Tensor, "cells batch"]:
        """Count the live keys before each of this rank's cells of keys."""
        held: Counter[int] = Counter()
        place = []
        for cell in self.plan.layout.keys:
            place.append((cell.rank, held[cell.rank]))
            held[cell.rank] += 1
        counts = torch.zeros(max(held.values(), default=0), len(live), dtype=torch.int64, device=live.device)
        for at, cell in enumerate(self.plan.cells):
            counts[at] = live[:, cell.base : cell.base + cell.size].sum(1)
        of_ranks = self.group.gather("live keys", counts.flatten()).unflatten(1, counts.shape)
        rank, at = torch.tensor(place, dtype=torch.int64, device=live.device).view(-1, 2).unbind(1)
        count = of_ranks[rank, at]
        return (count.cumsum(0) - count)[rank == self.group.rank]

    def reader(self, choice: Choice | None) -> Reader:
        """Return what computes attention once all keys are here."""
        return Reader(self.plan.layout, self.plan.cells, self.way.method, self.problem, choice)


@dataclass(frozen=True)
class _Read:
    """Keys beside values that this rank reads, and how they came here."""

    near: Tensor
    pool: Tensor | None
    live: Tensor | None
    route: Route
    choice: Choice | None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Exchange) -> tuple[Tensor, Tensor]:
        with call.group.together():
            return _forward(ctx, q, k, v, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.call.group.together():
            return _backward(ctx, grad_out, grad_lse)


def _forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Exchange) -> tuple[Tensor, Tensor]:
    learning = any(ctx.needs_input_grad[:3])
    queries = call.plan.align(call.group, q, "queries")
    keys = call.plan.align(call.group, torch.cat([k, v], 3), "keys")
    read = call.read(queries.x, keys.x)
    leaves = [x for x in (queries.x, read.near, read.pool) if x is not None]
    with torch.enable_grad(), torch.autocast(autocast_device(q), enabled=False):
        leaves = [x.detach().requires_grad_(learning) for x in leaves]
        found = call.reader(read.choice).attend(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None, read.live)
    out = call.plan.restore(call.group, found.out.detach().to(q.dtype), queries.route, "outputs")
    lse = call.plan.restore(call.group, found.lse.detach()[..., None], queries.route, "lse")[..., 0]
    if learning:
        ctx.call, ctx.kept = call, (leaves, found, read, queries.route, keys.route)
        ctx.tokens, ctx.width = keys.x.shape[2], k.shape[3]
    return out.clone(), lse.clone()


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    call, (leaves, found, read, queries, keys) = ctx.call, ctx.kept
    group, plan = call.group, call.plan
    # the same way that queries went, so that all ranks take part
    out = _sent(group, plan, grad_out, queries, "gradient of outputs of cut tiles")
    lse = _sent(group, plan, grad_lse[..., None], queries, "gradient of lse of cut tiles")[..., 0]
    wanted = [(x, g) for x, g in ((found.out, out), (found.lse, lse)) if x.requires_grad]
    grads = [torch.zeros_like(x) for x in leaves]
    if wanted:
        ends, weights = zip(*((x, g.to(x.dtype)) for x, g in wanted), strict=True)
        given = torch.autograd.grad(ends, leaves, weights, retain_graph=True, allow_unused=True)
        grads = [zero if x is None else x for x, zero in zip(given, grads, strict=True)]
    batch, kv_heads, _, width = grads[1].shape
    rows = batch * kv_heads * ctx.tokens
    total = group.move_back(read.route, "gradient of near", grads[1].reshape(-1, width), rows)
    if read.choice is not None:
        total = total + group.move_back(read.choice.route, "gradient of pool", grads[2].reshape(-1, width), rows)
    moved = plan.restore(group, total.view(batch, kv_heads, ctx.tokens, width), keys, "gradient of keys")
    return (
        plan.restore(group, grads[0], queries, "gradient of queries"),
        moved[..., : ctx.width],
        moved[..., ctx.width :],
        None,
    )


def _sent(group: Group, plan: Plan, gradient: Tensor, route: Route | None, purpose: str) -> Tensor:
    """Send gradients of outputs where the outputs were computed."""
    if route is None:
        return gradient
    rows = group.move(replace(route, purpose=purpose), gradient.reshape(-1, gradient.shape[3]))
    return rows.view(*gradient.shape[:2], plan.tokens, gradient.shape[3])
