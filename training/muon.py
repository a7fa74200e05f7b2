"""Muon: momentum whose steps are orthogonalised, for matrices; all matrices of a shape in one product."""

from collections import defaultdict

import torch
from torch import Tensor

# fused projections are orthogonalised in parts of so many rows
ROWS = 256


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards the nearest orthogonal matrices (Jordan et al., 2024, Muon), in float32.

    Args:
        g: ``[matrices, rows, columns]``.
        steps: number of iterations.
    """
    x = g / (torch.linalg.matrix_norm(g, keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """The optimiser of the matrices."""

    def __init__(self, params, momentum: float = 0.95, decay: float = 0.02) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(buffer, group["momentum"])
                for target, part in zip(p.split(ROWS), g.split(ROWS), strict=True):
                    by_shape[part.shape].append((target, part))
            for (rows, columns), pairs in by_shape.items():
                step = orthogonalise(torch.stack([part for _, part in pairs])) * max(1, rows / columns) ** 0.5
                for (target, _), each in zip(pairs, step, strict=True):
                    target.mul_(1 - group["lr"] * group["decay"]).add_(each, alpha=-group["lr"])
