"""Keys as rows of a matrix that is read a chunk at a time: nothing beside the scores grows with their number."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# keys converted to float64 at a time, for each list; the partition does not depend on the number of lists, nor do the bits
CHUNK = 1024


@dataclass(frozen=True)
class KeyRows:
    """The live keys of every list, in float64 and in chunks; keys that do not count are rows of zeros.

    Args:
        k: keys, ``[lists, keys, head_dim]``.
        counts: whether a key counts: it is live, and all its coordinates are finite.
        centre: subtracted from every key that counts, ``[lists, 1, head_dim]``; None for nothing.
    """

    k: Float[Tensor, "lists keys head_dim"]
    counts: Bool[Tensor, "lists keys"]
    centre: Float[Tensor, "lists 1 head_dim"] | None = None

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows, `size` at a time.

        Args:
            size: rows of a chunk.

        Yields:
            the place of the chunk, and its rows, ``[lists, chunk, head_dim]``, float64.
        """
        for begin in range(0, self.k.shape[1], size):
            part = slice(begin, min(begin + size, self.k.shape[1]))
            x = self.k[:, part].double()
            x = x if self.centre is None else x - self.centre
            yield part, x.masked_fill(~self.counts[:, part, None], 0.0)

    def centred(self) -> "KeyRows":
        """Subtract the mean of the keys that count."""
        total = self.k.new_zeros((self.k.shape[0], 1, self.k.shape[2]), dtype=torch.float64)
        for _, x in self.chunks():
            total += x.sum(1, keepdim=True)
        return replace(self, centre=total / self.counts.sum(1).clamp(min=1)[:, None, None])

    def of_list(self, index: int) -> "KeyRows":
        """Keep one list."""
        centre = None if self.centre is None else self.centre[index : index + 1]
        return KeyRows(self.k[index : index + 1], self.counts[index : index + 1], centre)


def key_rows(k: Float[Tensor, "lists keys head_dim"], total: Int[Tensor, "lists 1"] | None = None) -> KeyRows:
    """Name the keys that count: the leading live keys whose coordinates are all finite.

    Args:
        k: keys, live keys first.
        total: number of live keys of each list; None for all.

    Returns:
        the rows.
    """
    counts = finite_rows(k)
    if total is not None:
        counts = counts & (torch.arange(k.shape[1], dtype=torch.int64, device=k.device) < total)
    return KeyRows(k.detach(), counts)


def finite_rows(k: Float[Tensor, "*lists keys head_dim"]) -> Bool[Tensor, "*lists keys"]:
    """Return which keys have only finite coordinates, without a tensor as large as the keys."""
    if not k.numel():
        return torch.ones(k.shape[:-1], dtype=torch.bool, device=k.device)
    # both are NaN where a coordinate is
    return (k.detach().amax(-1) < torch.inf) & (k.detach().amin(-1) > -torch.inf)
