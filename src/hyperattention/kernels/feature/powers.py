"""Powers of products of features, as products of expanded features: what a state sums, and how rows read it.

(q . k)^1 has the features themselves. (q . k)^2 = sum_{i <= j} c_ij (q_i q_j) (k_i k_j), c_ij = 1 if i = j and 2
otherwise: the products of pairs of features, of which the symmetric half is enough, ``features (features + 1) / 2``.

All tensors hold features before rows, ``[lists, features, rows]``: the products of one feature with the others then lie
together, and each step is one long multiplication.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Power(ABC):
    """A power of products of features."""

    @abstractmethod
    def expanded(self, features: int) -> int:
        """Count the expanded features."""

    @abstractmethod
    def expand(self, x: Tensor) -> Tensor:
        """Expand the features of keys."""

    @abstractmethod
    def weigh(self, product: Tensor) -> Tensor:
        """Raise products of features to the power."""

    @abstractmethod
    def slope(self, product: Tensor) -> Tensor:
        """Differentiate the power of a product by the product."""

    @abstractmethod
    def read(self, query: Tensor, state: Tensor) -> Tensor:
        """Multiply expanded queries by a state."""

    @abstractmethod
    def pull(self, query: Tensor, state: Tensor, slope: Tensor) -> Tensor:
        """Differentiate slope . read(query) by the query."""


@dataclass(frozen=True)
class FirstPower(Power):
    """The products themselves."""

    def expanded(self, features: int) -> int:
        """As many as there are."""
        return features

    def expand(self, x: Tensor) -> Tensor:
        """Nothing to do."""
        return x

    def weigh(self, product: Tensor) -> Tensor:
        """Nothing to do."""
        return product

    def slope(self, product: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(product)

    def read(self, query: Tensor, state: Tensor) -> Tensor:
        """Return ``[lists, rows, width]`` from ``[lists, features, rows]`` and ``[lists, features, width]``."""
        return query.transpose(1, 2) @ state

    def pull(self, query: Tensor, state: Tensor, slope: Tensor) -> Tensor:
        """Return ``[lists, rows, features]``, with `slope` of shape ``[lists, rows, width]``."""
        return slope @ state.transpose(1, 2)


@dataclass(frozen=True)
class SecondPower(Power):
    """Squares of products."""

    def expanded(self, features: int) -> int:
        """Pairs of features, each pair once."""
        return features * (features + 1) // 2

    def expand(self, x: Tensor) -> Tensor:
        """Return the products of all pairs, ``[lists, pairs, rows]``."""
        return self._products(x, x)

    def weigh(self, product: Tensor) -> Tensor:
        """Square."""
        return product.square()

    def slope(self, product: Tensor) -> Tensor:
        """Twice the product."""
        return 2 * product

    def read(self, query: Tensor, state: Tensor) -> Tensor:
        """Return ``[lists, rows, width]``, with `state` of shape ``[lists, pairs, width]``."""
        # pairs of two features stand for two products: a sum of both halves of a square
        return self._products(query, 2 * query).transpose(1, 2) @ state

    def pull(self, query: Tensor, state: Tensor, slope: Tensor) -> Tensor:
        """Return ``[lists, rows, features]``: twice the symmetric matrix of slopes of pairs, times the query."""
        by_pair, features, start = state @ slope.transpose(1, 2), query.shape[1], 0
        result = torch.zeros_like(query)
        for i in range(features):
            part = by_pair[:, start : start + features - i]  # pairs (i, i), (i, i + 1), ...
            result[:, i] += (part * query[:, i:]).sum(1)
            result[:, i + 1 :].addcmul_(part[:, 1:], query[:, i : i + 1])
            start += features - i
        return 2 * result.transpose(1, 2)

    def _products(self, x: Tensor, others: Tensor) -> Tensor:
        """Multiply feature i of `x` by itself and by the features after i of `others`."""
        features, start = x.shape[1], 0
        result = x.new_empty(len(x), self.expanded(features), x.shape[2])
        for i in range(features):
            end = start + features - i
            torch.mul(x[:, i], x[:, i], out=result[:, start])
            torch.mul(others[:, i + 1 :], x[:, i : i + 1], out=result[:, start + 1 : end])
            start = end
        return result


POWERS: dict[int, Power] = {1: FirstPower(), 2: SecondPower()}
