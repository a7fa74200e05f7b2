"""Groups of alike rows, formed around the rows that are farthest from one another."""

import torch
from jaxtyping import Float
from torch import Tensor

# times that groups are formed anew around their means
MEAN_STEPS = 2


def grouped(x: Float[Tensor, "sets rows width"], groups: int) -> Float[Tensor, "sets rows groups"]:
    """Group the rows of every set: around those that are farthest from one another, then around the means.

    A row unlike all others, as a query is that looks for a single key, has a group of its own.

    Args:
        x: the rows.
        groups: groups of each set; some stay empty where rows are equal.

    Returns:
        1 where a row belongs to a group, else 0.
    """
    off = x - x.mean(1, keepdim=True)
    farthest, distance, centres = off.square().sum(-1), torch.full_like(x[..., 0], torch.inf), []
    for _ in range(groups):
        centres.append(x.gather(1, farthest.argmax(1)[:, None, None].expand(-1, 1, x.shape[2])))
        farthest = distance = torch.minimum(distance, (x - centres[-1]).square().sum(-1))
    centre = torch.cat(centres, 1)
    for step in range(MEAN_STEPS + 1):
        nearest = (centre.square().sum(-1)[:, None] - 2 * x @ centre.transpose(1, 2)).argmin(-1)
        one_of = torch.nn.functional.one_hot(nearest, groups).to(x.dtype)
        if step < MEAN_STEPS:
            count = one_of.sum(1)[..., None]
            centre = torch.where(count > 0, one_of.transpose(1, 2) @ x / count.clamp(min=1), centre)
    return one_of
