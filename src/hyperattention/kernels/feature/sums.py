"""Weighted sums over the leading keys of each row: a state for the keys that a block of rows shares, pairs for the rest.

Rows are processed in the order of their limits, one block at a time: keys below the smallest limit of a block are in the
state, and the few keys between its limits are weighted pair by pair.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.kernels.feature.powers import Power
from hyperattention.kernels.feature.scales import Scales, finite

# keys between the state and a row's limit, weighted pair by pair: about as many products as reading a state needs
BLOCK_KEYS = 128
# rows read, or keys added, at once: bounds the copies in the accumulation dtype, and expanded features
CHUNK_ROWS = 512
# powers of two by which the largest scale of a block may exceed that of a row's own keys before each row gets its own base
FAR_ABOVE = 24.0


@dataclass(frozen=True)
class Keys:
    """Keys in order, and what each adds to a sum.

    Args:
        key: ``[lists, keys, features]``.
        value: ``[lists, keys, width]``.
        scales: of each key, ``[lists, keys]``.
    """

    key: Tensor
    value: Tensor
    scales: Scales

    def __getitem__(self, part: slice) -> "Keys":
        """Select some keys."""
        return Keys(self.key[:, part], self.value[:, part], self.scales[:, part])

    def scaled(self, base: Tensor) -> Tensor:
        """Return exp(log scale) / 2^base times values, ``[lists, keys, width]``, for `base` of shape ``[lists, 1]``."""
        scale = self.scales.above(base)
        return self.value.to(scale.dtype) * scale[..., None]


@dataclass(frozen=True)
class Block:
    """Rows of similar limits, and all they need.

    Args:
        rows: their numbers: a slice, or an index.
        state: sum over the shared keys of 2^-base exp(log scale) expanded key value^T, ``[lists, expanded, width]``.
        decay: 2^(base of the state - base), ``[lists, rows or 1, 1]``.
        key: the near keys, ``[lists, near, features]``.
        value: their scaled values, ``[lists, near, width]``.
        weight: what each pair's product is multiplied by: 0 if hidden; ``[rows, near]``, or with lists before.
        base: exponent of the unit of the sums, ``[lists, rows]``; -inf if a row sees no key.
    """

    rows: Tensor
    state: Tensor
    decay: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    base: Tensor


def _cuts(limit: Tensor, top: Tensor) -> list[list[int]]:
    """Cut rows, ordered by limit, into blocks of similar limits.

    Args:
        limit: of each row, ascending.
        top: largest exponent among the keys of each row, ``[lists, rows]``.

    Returns:
        for each block its first row, the one after its last, its smallest and largest limit, and how many of its rows
        have a largest exponent far below the block's.
    """
    place, number = limit // BLOCK_KEYS, torch.arange(len(limit), dtype=torch.int64, device=limit.device)
    cut = number % CHUNK_ROWS == 0
    cut[1:] |= place[1:] != place[:-1]
    edges = torch.cat([number[cut], number.new_tensor([len(limit)])])
    starts, ends = edges[:-1], edges[1:]
    apart = top[:, ends - 1].repeat_interleave(ends - starts, 1) - top > FAR_ABOVE
    apart = (apart & (top > -torch.inf)).any(0).cumsum(0)
    apart = torch.cat([apart.new_zeros(1), apart])
    return torch.stack([starts, ends, limit[starts], limit[ends - 1], apart[ends] - apart[starts]], 1).tolist()


def blocks(keys: Keys, limit: Tensor, power: Power) -> Iterator[Block]:
    """Walk over rows in the order of their limits.

    Args:
        keys: the keys.
        limit: number of leading keys each row sees, 0 to keys, in any order: ``[rows]``, shared by the lists.
        power: of products of features.

    Yields:
        blocks, each row in one of them.
    """
    exponent = keys.scales.exponent
    limit, order = limit.sort(stable=True)
    # the largest exponent among the keys of each row
    tops = torch.cat([exponent.new_full((len(exponent), 1), -torch.inf), exponent.cummax(1)[0]], 1)
    top = tops[:, limit]
    size = power.expanded(keys.key.shape[2])
    state, base, end = exponent.new_zeros(len(exponent), size, keys.value.shape[2]), tops[:, :1], 0
    for first, last, low, high, apart in _cuts(limit, top):
        while end < low:
            part = slice(end, min(end + CHUNK_ROWS, low))
            end, before, base = part.stop, base, tops[:, part.stop, None]
            state = _add(state * (before - finite(base)).exp2()[..., None], keys[part], base, power)
        yield _block(
            order[first:last],
            (state, base),
            keys[low:high],
            (limit[first:last] - low)[:, None],
            top[:, first:last],
            bool(apart),
        )


def _block(rows: Tensor, state: tuple[Tensor, Tensor], near: Keys, shown: Tensor, top: Tensor, apart: bool) -> Block:
    """Weigh the near keys of some rows.

    Args:
        rows: their numbers.
        state: of the shared keys, and its base.
        near: the keys behind those.
        shown: how many of them each row sees, ``[rows, 1]``.
        top: largest exponent among the keys of each row, ``[lists, rows]``.
        apart: whether each row needs a base of its own.

    Returns:
        the block.
    """
    total, before = state
    dtype = total.dtype
    hidden = torch.arange(near.key.shape[1], dtype=torch.int64, device=shown.device) >= shown
    base = top if apart else top[:, -1:]
    if apart:
        raised = near.scales.exponent[:, None] - finite(base)[..., None]
        weight = raised.masked_fill(hidden, -torch.inf).exp2()
        value = near.value.to(dtype) * near.scales.factor[..., None]
    else:
        weight, value = (~hidden).to(dtype), near.scaled(base)
    decay = (before - finite(base)).exp2()[..., None]
    # rows that see no key have no base, lest 0 meets an overflow
    base = base.expand_as(top).masked_fill(top == -torch.inf, -torch.inf)
    return Block(rows, total, decay, near.key.to(dtype), value, weight, base)


def _add(state: Tensor, keys: Keys, base: Tensor, power: Power) -> Tensor:
    """Add keys to a state of the same base."""
    key = power.expand(keys.key.to(state.dtype).transpose(1, 2))
    return torch.baddbmm(state, key, keys.scaled(base))


def product_of(block: Block, query: Tensor) -> Tensor:
    """Multiply rows by their near keys, ``[lists, rows, near]``."""
    return query @ block.key.transpose(1, 2)


def read(block: Block, query: Tensor, product: Tensor, power: Power) -> Tensor:
    """Sum the values of the keys that each row sees.

    total_i = sum_{j < limit_i} 2^-base_i exp(log scale_j) (query_i . key_j)^power value_j

    Args:
        block: the rows.
        query: their features, ``[lists, rows, features]``.
        product: `product_of` them.
        power: of products of features.

    Returns:
        the sums, ``[lists, rows, width]``.
    """
    total = power.read(query.transpose(1, 2), block.state) * block.decay
    return torch.baddbmm(total, power.weigh(product) * block.weight, block.value)


def pull(block: Block, query: Tensor, slope: Tensor, product: Tensor, power: Power) -> Tensor:
    """Differentiate slope . `read` by the query.

    Args:
        block: the rows.
        query: their features.
        slope: of a loss in their sums, ``[lists, rows, width]``.
        product: `product_of` them.
        power: of products of features.

    Returns:
        the gradient, ``[lists, rows, features]``.
    """
    total = power.pull(query.transpose(1, 2), block.state, slope) * block.decay
    return torch.baddbmm(total, power.slope(product) * (slope @ block.value.transpose(1, 2)) * block.weight, block.key)
