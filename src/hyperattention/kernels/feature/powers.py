"""Powers of products of features, as products of expanded features: what a state sums, and how rows read it.

(q . k)^1 has the features themselves, (q . k)^2 the products of pairs of features. Pairs (i, j) and (j, i) are the same, so
that the symmetric half is enough: features are halved again and again, and each first half is multiplied by its second,
until pieces of 4, or of an odd size, are left, whose products are all kept: ``features (features + piece) / 2`` in all.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hyperattention.kernels.feature.columns import Columns, by_block
from hyperattention.kernels.feature.workspace import Workspace

# features are padded with zeros to a multiple of this, so that they can be halved three times
MULTIPLE = 8
# pieces of this size are not halved: what that saves in products, it costs in multiplications one after the other
PIECE = 4


class Power(ABC):
    """A power of products of features."""

    degree: ClassVar[int]

    @abstractmethod
    def padded(self, features: int) -> int:
        """Count the features that upright rows have."""

    @abstractmethod
    def expanded(self, features: int) -> int:
        """Count the expanded features."""

    @abstractmethod
    def keys(self, key: Tensor, blocks: int, work: Workspace) -> Tensor:
        """Cut keys ``[lists, keys, features]`` into blocks ``[blocks * lists, keys of one, padded]``, in any order."""

    @abstractmethod
    def expand(self, key: Tensor, work: Workspace) -> Tensor:
        """Expand keys, as `keys` returns them, to ``[.., expanded, keys]``."""

    @abstractmethod
    def weigh(self, product: Tensor) -> Tensor:
        """Raise products of features to the power, in place."""

    @abstractmethod
    def slope(self, product: Tensor | None, by: Tensor) -> Tensor:
        """Differentiate the power of a product by the product, times `by`, in place of `by`."""

    @abstractmethod
    def read(self, query: Tensor, state: Tensor, total: Tensor, work: Workspace) -> None:
        """Write expanded queries, given upright, times states ``[.., expanded, width]`` to ``[.., rows, width]``."""

    @abstractmethod
    def pull(self, query: Tensor, state: Tensor, slope: Tensor, work: Workspace) -> Tensor:
        """Differentiate slope . read(query, state) by the query, all upright, for `slope` of ``[.., width, rows]``."""


@dataclass(frozen=True)
class FirstPower(Power):
    """The products themselves."""

    degree: ClassVar[int] = 1

    def padded(self, features: int) -> int:
        """As many as there are."""
        return features

    def expanded(self, features: int) -> int:
        """As many as there are."""
        return features

    def keys(self, key: Tensor, blocks: int, work: Workspace) -> Tensor:
        """Copy them only if they lie in another order, or have another dtype than sums."""
        key = by_block(key, blocks)
        if key.dtype != work.dtype or min(key.shape[:2]) > 1:
            key = work.take("key", *key.shape).copy_(key)
        return key.flatten(0, 1)

    def expand(self, key: Tensor, work: Workspace) -> Tensor:
        """Nothing to do."""
        return key.transpose(1, 2)

    def weigh(self, product: Tensor) -> Tensor:
        """Nothing to do."""
        return product

    def slope(self, product: Tensor | None, by: Tensor) -> Tensor:
        """One."""
        return by

    def read(self, query: Tensor, state: Tensor, total: Tensor, work: Workspace) -> None:
        """One product."""
        torch.bmm(query.transpose(1, 2), state, out=total)

    def pull(self, query: Tensor, state: Tensor, slope: Tensor, work: Workspace) -> Tensor:
        """One product."""
        return torch.bmm(state, slope, out=work.take("pulled", *query.shape))


@dataclass(frozen=True)
class SecondPower(Power):
    """Squares of products."""

    degree: ClassVar[int] = 2

    def padded(self, features: int) -> int:
        """A multiple of `MULTIPLE`."""
        return -(-features // MULTIPLE) * MULTIPLE

    def expanded(self, features: int) -> int:
        """Pairs of different halves once, those of a piece as they are."""
        return sum(count * size * size for count, size in _levels(self.padded(features)))

    def keys(self, key: Tensor, blocks: int, work: Workspace) -> Tensor:
        """Hold keys upright, as `expand` multiplies them."""
        return Columns(key).upright(blocks, self.padded(key.shape[2]), "key", work).transpose(1, 2)

    def expand(self, key: Tensor, work: Workspace) -> Tensor:
        """Multiply features by features; pairs of different halves stand for two, and are doubled."""
        return self._pairs(key.transpose(1, 2), 2.0, work)

    def weigh(self, product: Tensor) -> Tensor:
        """Square."""
        return product.square_()

    def slope(self, product: Tensor | None, by: Tensor) -> Tensor:
        """Twice the product."""
        assert product is not None, "the slope of a square needs the product"
        return by.mul_(product).mul_(2)

    def read(self, query: Tensor, state: Tensor, total: Tensor, work: Workspace) -> None:
        """One product, of pairs."""
        torch.bmm(self._pairs(query, 1.0, work).transpose(1, 2), state, out=total)

    def pull(self, query: Tensor, state: Tensor, slope: Tensor, work: Workspace) -> Tensor:
        """Slopes of pairs, by each feature times the other of its pair."""
        by_pair = torch.bmm(state, slope, out=work.take("pairs", len(query), state.shape[1], slope.shape[2]))
        result = work.take("pulled", *query.shape).zero_()
        key = "terms", *_key(query, by_pair, result)
        for into, part, other in work.once(key, lambda: list(_terms(query, by_pair, result))):
            into.addcmul_(part, other)
        return result

    def _pairs(self, x: Tensor, times: float, work: Workspace) -> Tensor:
        """Multiply features ``[.., features, rows]``, with `times` for pairs of different halves."""
        result = work.take("pairs", x.shape[0], self.expanded(x.shape[1]), x.shape[2])
        others = x if times == 1.0 else torch.mul(x, times, out=work.take("times", *x.shape))
        key = "factors", *_key(x, others, result)
        for first, second, part in work.once(key, lambda: list(_factors(x, others, result))):
            torch.mul(first, second, out=part)
        return result


def _key(*tensors: Tensor) -> tuple:
    return tuple((x.data_ptr(), x.shape) for x in tensors)


def _factors(x: Tensor, others: Tensor, pairs: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield both halves of features of each level, those of a second half from `others`, and the place of their pairs.

    Halves are ``[.., count, size, 1, rows]`` and ``[.., count, 1, size, rows]``, pairs ``[.., count, size, size, rows]``.
    """
    start = 0
    for count, size in _levels(x.shape[1]):
        end = start + count * size * size
        # pieces are paired with themselves, each pair twice
        second = x if end == pairs.shape[1] else others
        part = pairs[:, start:end].view(x.shape[0], count, size, size, x.shape[2])
        yield _halves(x, count, size)[0].unsqueeze(3), _halves(second, count, size)[1].unsqueeze(2), part
        start = end


def _terms(query: Tensor, by_pair: Tensor, result: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield where slopes of pairs times features are added, the slopes, and the other feature of each pair."""
    for (first, second, part), (count, size) in zip(_factors(query, query, by_pair), _levels(query.shape[1]), strict=True):
        into_first, into_second = _halves(result, count, size)
        for i in range(size):
            yield into_first, part[:, :, :, i], second[:, :, :, i]
            yield into_second, part[:, :, i], first[:, :, i]


def _levels(features: int) -> Iterator[tuple[int, int]]:
    """Yield how many pairs of halves there are, and the size of a half; last, the pieces, each paired with itself."""
    size = features
    while size % 2 == 0 and size > PIECE:
        size //= 2
        yield features // (2 * size), size
    if size:
        yield features // size, size


def _halves(x: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """View features ``[.., features, rows]`` as pairs of halves, each ``[.., count, size, rows]``; pieces are both."""
    if count * size == x.shape[1]:
        pieces = x.view(x.shape[0], count, size, x.shape[2])
        return pieces, pieces
    first, second = x.view(x.shape[0], count, 2, size, x.shape[2]).unbind(2)
    return first, second


POWERS: dict[int, Power] = {1: FirstPower(), 2: SecondPower()}
