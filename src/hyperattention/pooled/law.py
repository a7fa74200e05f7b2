"""How often each key is to be listed: certain for keys of the largest shares, in proportion for others, a part evenly.

Owners of keys send only counts and sums by the size of shares; the listings of every owner follow from these alone.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# sizes of shares that are told apart: half octaves from 2^-30 to 2^8
_LOWEST, _HIGHEST = -30, 8
# above the highest edge: listed for certain
CERTAIN = 2.0 ** (_HIGHEST + 1)
# just below the highest edge: no estimate makes a key certain
MOST = 2.0 ** (_HIGHEST - 1)
NUM_SIZES = 2 * (_HIGHEST - _LOWEST) + 2
# expected listings closer than this to one another are the same
_STEPS = 1024
# numbers of a reply: edge, factor of shares, even listings, listings before, first point, points
NUM_REPLY = 6


def _edges(device: torch.device) -> Tensor:
    return torch.exp2(torch.arange(2 * _LOWEST, 2 * _HIGHEST + 1, dtype=torch.float64, device=device) / 2)


def _size(share: Tensor) -> Tensor:
    return torch.bucketize(share.double(), _edges(share.device), right=True)


def histogram(share: Float[Tensor, "lists keys"], eligible: Bool[Tensor, "lists keys"]) -> Float[Tensor, "lists numbers"]:
    """Count keys, and add up their shares, by the size of the share.

    Args:
        share: estimated shares of keys.
        eligible: which keys may be drawn.

    Returns:
        counts, then sums.
    """
    counted = share.new_zeros(2, len(share), NUM_SIZES, dtype=torch.float64)
    size = _size(share)
    counted[0].scatter_add_(1, size, eligible.double())
    counted[1].scatter_add_(1, size, share.double() * eligible)
    return counted.transpose(0, 1).flatten(1)


def replies(
    numbers: Float[Tensor, "lists owners numbers"], num: int, even: float, noise: Float[Tensor, " lists"]
) -> Float[Tensor, "lists owners reply"]:
    """Decide how often keys are listed, so that `num` are expected, and which points each owner finds keys at.

    Keys of a share of at least an edge E are certain, C of them. For the N - C others, with shares that add up to S,

        p_j = (1 - e) s_j / T + e R / (N - C),    R = num - C,   T = max(S / R, E),   e >= even

    The edge is the one with the most expected listings; p_j <= 1 because s_j < E <= T. Points are evenly spaced.

    Args:
        numbers: the histogram of every owner, in the order of their positions.
        num: slots of the pool.
        even: share of the draws that is spread evenly.
        noise: where inside a slot the points of each list lie.

    Returns:
        for each owner: the number of the edge (-1 if all keys are certain), the factor of shares, the even listings, the
        listings of earlier owners, the number of the first point, and how many there are.
    """
    count, total = numbers.unflatten(2, (2, -1)).unbind(2)  # [lists, owners, sizes]
    certain, shares = _beyond(count), total.cumsum(2) - total  # before each size
    # entry 0: no edge, all keys are certain; entry j + 1: edge number j
    all_certain, all_shares, keys = certain.sum(1), shares.sum(1), count.sum((1, 2))
    room = num - all_certain  # [lists, sizes]
    edge = torch.cat([torch.zeros_like(_edges(count.device)[:1]), _edges(count.device)])
    bar = torch.maximum(all_shares / room.clamp(min=1e-9), edge).clamp(min=torch.finfo(torch.float64).tiny)
    expected = (all_certain + all_shares / bar).masked_fill(room <= 0, -1.0)
    # no other edge comes as close as rounding where there is room for every key
    expected[:, 0] = torch.full_like(keys, -1.0).masked_fill_(keys <= num, torch.inf)
    # the largest edge of those with the most; in steps, so that rounding decides nothing
    expected = (expected * _STEPS).round()
    best = expected.shape[1] - 1 - expected.flip(1).argmax(1, keepdim=True)
    pick = best[:, None].expand(-1, count.shape[1], 1)
    room, bar, left = (x.gather(1, best) for x in (room, bar, keys[:, None] - all_certain))
    used = all_shares.gather(1, best) / bar
    evenly = (1 - used / room.clamp(min=1e-9)).clamp(min=even, max=1.0)
    factor = (1 - evenly) / bar
    each = evenly * room / left.clamp(min=1)
    own, own_shares = certain.gather(2, pick)[..., 0], shares.gather(2, pick)[..., 0]
    listings = own + factor * own_shares + each * (count.sum(2) - own)
    before = listings.cumsum(1) - listings
    first = (before - noise[:, None]).ceil().clamp(min=0, max=num)
    last = (listings.sum(1, keepdim=True) - noise[:, None]).ceil().clamp(min=0, max=num)
    points = torch.cat([first[:, 1:], last], 1) - first
    fixed = ((best - 1).double(), factor, each)
    return torch.stack([*(x.expand_as(before) for x in fixed), before, first, points.clamp(min=0)], 2)


def _beyond(count: Tensor) -> Tensor:
    """Count the keys of each size and of all larger ones."""
    return count.flip(2).cumsum(2).flip(2)


@dataclass(frozen=True)
class Drawn:
    """Keys that an owner lists.

    Args:
        index: keys of each list, counted from the owner's first; entries from `points` on mean nothing.
        chance: how often each key is expected to be listed.
        first: the slot of the first key of each list.
        points: keys of each list.
    """

    index: Int[Tensor, "lists most"]
    chance: Float[Tensor, "lists most"]
    first: Int[Tensor, " lists"]
    points: Int[Tensor, " lists"]


def draw(
    share: Float[Tensor, "lists keys"], eligible: Bool[Tensor, "lists keys"], reply: Float[Tensor, "lists reply"],
    noise: Float[Tensor, " lists"],
) -> Drawn:  # fmt: skip
    """Find the keys at an owner's points.

    Args:
        share: as for `histogram`.
        eligible: as for `histogram`.
        reply: the owner's part of `replies`.
        noise: as for `replies`.

    Returns:
        the keys.
    """
    edge, factor, each, before, first, points = reply[..., None].unbind(1)
    chance = (share.double() * factor + each).masked_fill(_size(share) > edge, 1.0).masked_fill(~eligible, 0.0)
    ends = chance.cumsum(1) + before
    slot = torch.arange(int(points.max()) if points.numel() else 0, dtype=torch.float64, device=share.device)
    index = torch.searchsorted(ends, first + slot + noise[:, None], right=True).clamp(max=share.shape[1] - 1)
    return Drawn(index, chance.gather(1, index), first[:, 0].long(), points[:, 0].long())
