"""Convert scores to probabilities, and probabilities to draws."""

import torch
from torch import Tensor
from torch.nn.functional import pad

# rounds in which probabilities above one draw's share are cut to that share and the excess goes to the others
_CLIP_ROUNDS = 2
# masses added up in their own precision: few enough to lose little, and many enough to be quick
_STRETCH = 128
# candidates for each slot from which a search is faster than counting the points below every candidate
_SPARSE = 6


def root_mean_square(score: Tensor, allowed: Tensor) -> Tensor:
    """Combine the weights that several queries give the same candidates: (sum_i softmax_j(s_ij)^2)^(1/2).

    Args:
        score: ``[lists, chunk, pooled, candidates]``; overwritten.
        allowed: ``[lists, chunk, candidates]``, candidates that exist.

    Returns:
        ``[lists, chunk, candidates]``, 0 for candidates that do not exist; not normalised.
    """
    weight = torch.softmax(score.masked_fill_(~allowed[:, :, None], -torch.inf), -1)
    combined = weight[:, :, 0] if weight.shape[2] == 1 else weight.square_().sum(2).sqrt_()
    # rows of only -inf, and scores that are not finite, give NaN: other draws cover such candidates
    return torch.nan_to_num_(combined, nan=0.0)


def clipped(mass: Tensor, num: int) -> Tensor:
    """Normalise masses to probabilities, none much above 1 / num, because listing a key twice is useless."""
    total = mass.sum(-1, keepdim=True)
    for _ in range(_CLIP_ROUNDS):
        mass = torch.minimum(mass, total / num)
        total = mass.sum(-1, keepdim=True)
    return mass / total.clamp(min=torch.finfo(mass.dtype).tiny)


def total_mass(mass: Tensor) -> Tensor:
    """Add up along the last axis, in float64 but for short stretches; zeros behind the last mass change no bit.

    Args:
        mass: ``[..., candidates]``.

    Returns:
        ``[..., 1]``, in the dtype of `mass`.
    """
    whole = mass.shape[-1] // _STRETCH * _STRETCH
    parts = mass[..., :whole].unflatten(-1, (-1, _STRETCH)).sum(-1) if whole else mass[..., :0]
    if whole < mass.shape[-1]:
        rest = pad(mass[..., whole:], (0, whole + _STRETCH - mass.shape[-1])).sum(-1, keepdim=True)
        parts = torch.cat([parts, rest], -1)
    return parts.sum(-1, keepdim=True, dtype=torch.float64).to(mass.dtype)


def running_sum(mass: Tensor, *, fixed: bool | None = None) -> Tensor:
    """Compute running sums of non-negative masses along the last axis, bit-identical in every run.

    Args:
        mass: ``[..., candidates]``.
        fixed: whether to sum in fixed point, where the order of the sum does not matter; None does so on all devices except
            a CPU, because torch guarantees no order of floating-point running sums there.

    Returns:
        the sums, ascending, of the shape and dtype of `mass`.
    """
    if not (mass.device.type != "cpu" if fixed is None else fixed):
        return mass.cumsum(-1)
    unit = 2.0**40 / mass.sum(-1, keepdim=True, dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)
    return ((mass * unit).long().cumsum(-1) / unit).to(mass.dtype)


def inverse(mass: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the distribution function of `mass` at evenly spaced points of [0, 1).

    Args:
        mass: ``[lists, chunk, candidates]``, of any sum.
        point: ``[lists, chunk, slots]``, the first in the first of equal strata, the others a stratum's length apart.

    Returns:
        the candidates, and the fraction of each candidate at which the point falls, in [0, 1).
    """
    point = point.to(mass.dtype)
    running = running_sum(mass)
    # scaled by the last sum, so that rounding puts no point beyond it
    scale = running[..., -1:]
    sparse = mass.device.type == "cpu" and mass.shape[-1] >= _SPARSE * point.shape[-1]
    at = _searched(running, point * scale) if sparse else _counted(running, point)
    own = mass.gather(-1, at)
    inside = (point * scale - running.gather(-1, at) + own) / own.clamp(min=torch.finfo(mass.dtype).tiny)
    return at, inside.clamp_(0.0, 1.0 - torch.finfo(mass.dtype).eps)


def _searched(running: Tensor, place: Tensor) -> Tensor:
    """Find the first candidate whose running sum exceeds each place."""
    # rounding must not move a point past the last candidate with positive mass
    last = torch.searchsorted(running, running[..., -1:].contiguous())
    return torch.minimum(torch.searchsorted(running, place, right=True), last)


def _counted(running: Tensor, point: Tensor) -> Tensor:
    """Find the same for evenly spaced points, of which all but the first are known: by how often each candidate is hit."""
    slots, scale = point.shape[-1], running[..., -1:]
    # points below the end of each candidate; the increase is how often the candidate is hit
    passed = (running / scale * slots - point[..., :1] * slots).ceil_().nan_to_num_(nan=0.0).clamp_(0, slots)
    # rounding must not move a point past the last candidate with positive mass
    passed.masked_fill_(running >= scale, slots)[..., -1] = slots
    hits = torch.diff(passed, dim=-1, prepend=torch.zeros_like(passed[..., :1])).long()
    row = torch.arange(running.shape[:-1].numel(), dtype=torch.int64, device=running.device).view(*running.shape[:-1], 1)
    return torch.repeat_interleave(hits.flatten(), output_size=point.numel()).view(point.shape) - row * running.shape[-1]
