"""What decoding keeps of a text: sums over whole blocks, and the tokens of the last block."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.types import Partial


@dataclass(frozen=True)
class PolySketchState:
    """The text that a layer has read, in a size that does not depend on its length.

    total = sum over the keys of whole blocks of phi(k_j) (v_j, 1)^T,   phi(k) = the products of pairs of features of M(k)

    Each pair counts once: features (features + 1) / 2 products are enough for the square of a product.

    Args:
        total: the sums, float32 at least; the last column is for the denominator.
        key: keys of the block that is not whole yet, as the exact weights of the block read them.
        key_sketch: M of these keys.
        value: values of these keys.
        position: number of tokens read.
    """

    total: Float[Tensor, "batch heads pairs width"]
    key: Float[Tensor, "batch heads near head_dim"]
    key_sketch: Float[Tensor, "batch heads near features"]
    value: Float[Tensor, "batch heads near value_dim"]
    position: int

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors: at most one block more than the sums."""
        return sum(x.numel() * x.element_size() for x in (self.total, self.key, self.key_sketch, self.value))

    def read_past(self, query_sketch: Float[Tensor, "batch heads queries features"]) -> Partial:
        """Attend to the keys of all whole blocks.

        Args:
            query_sketch: M of the queries.

        Returns:
            the rows, and the logs of their denominators; 0 and -inf if a denominator is 0.
        """
        sums = _pairs(query_sketch, twice=True).to(self.total.dtype) @ self.total
        # as the kernel has it: a sum below the smallest normal number counts as 0
        empty = sums[..., -1] < torch.finfo(sums.dtype).tiny
        denominator = sums[..., -1].masked_fill(empty, 1.0)
        out = (sums[..., :-1] / denominator[..., None]).masked_fill(empty[..., None], 0.0)
        return Partial(out.to(self.value.dtype), denominator.log().masked_fill(empty, -torch.inf))

    def add(self, key: Tensor, key_sketch: Tensor, value: Tensor) -> "PolySketchState":
        """Append tokens to the last block.

        Args:
            key: keys for the exact weights, ``[batch, heads, tokens, head_dim]``.
            key_sketch: M of the keys.
            value: values.

        Returns:
            the new state.
        """
        pairs = (self.key, key), (self.key_sketch, key_sketch), (self.value, value)
        near = (torch.cat(pair, 2) for pair in pairs)
        return self._of(self.total, near, self.position + key.shape[2])

    def sum_up(self) -> "PolySketchState":
        """Add the last block to the sums, and start another one.

        Returns:
            the new state.
        """
        features = _pairs(self.key_sketch, twice=False).to(self.total.dtype)
        values = torch.cat([self.value, self.value.new_ones((*self.value.shape[:-1], 1))], -1).to(self.total.dtype)
        total = self.total + features.transpose(2, 3) @ values
        nothing = (x[:, :, :0] for x in (self.key, self.key_sketch, self.value))
        return self._of(total, nothing, self.position)

    @staticmethod
    def _of(total: Tensor, near: Iterable[Tensor], position: int) -> "PolySketchState":
        key, key_sketch, value = near
        return PolySketchState(total, key, key_sketch, value, position)


def _pairs(x: Tensor, *, twice: bool) -> Tensor:
    """Multiply features in pairs, each pair once; `twice` for the query, so that pairs of two features count twice."""
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], dtype=torch.int64, device=x.device)
    products = x[..., first] * x[..., second]
    return products * torch.where(first == second, 1, 2).to(x.dtype) if twice else products
