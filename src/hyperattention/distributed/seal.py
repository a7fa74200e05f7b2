"""A seal behind every message: its kind, and a sum over it, so that what was damaged, cut or misplaced is not read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

# bytes of a seal: what the message is, and the sum
SIZE = 16
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# odd factors: sums are taken modulo 2^64, where an odd number times a difference is no zero
_BY_SENDER, _BY_RECEIVER, _BY_ROWS, _BY_PLACE = (
    0x1E3779B97F4A7C15,
    0x3F58476D1CE4E5B9,
    0x14D049BB133111EB,
    0x2545F4914F6CDD1D,
)


@dataclass(frozen=True)
class Seals:
    """The seals of one exchange.

    Args:
        what: a number of what moves: purpose, round, width, dtype and plan.
        rank: this rank.
    """

    what: int
    rank: int

    def close(self, data: Shaped[Tensor, "rows width"], sent: Sequence[int]) -> UInt8[Tensor, " bytes"]:
        """Lay out messages for the wire.

        Args:
            data: rows for other ranks, by rank.
            sent: rows for each rank.

        Returns:
            the bytes of every message that has rows, each followed by its seal.
        """
        to = torch.arange(len(sent), dtype=torch.int64, device=data.device)
        seals = self._seals(data, sent, torch.full_like(to, self.rank), to)
        each = data.shape[1] * data.element_size()
        parts = data.contiguous().view(-1).view(torch.uint8).split([count * each for count in sent])
        pairs = zip(parts, seals.view(torch.uint8).view(-1, SIZE).unbind(0), sent, strict=True)
        return torch.cat([data.new_empty(0, dtype=torch.uint8), *(x for *pair, count in pairs if count for x in pair)])

    def open(
        self, data: UInt8[Tensor, " bytes"], received: Sequence[int], like: Shaped[Tensor, "_ width"]
    ) -> tuple[Shaped[Tensor, "rows width"], list[int]]:
        """Take messages apart.

        Args:
            data: messages as they came from the wire.
            received: rows that each rank was to send.
            like: a tensor of the same width and dtype.

        Returns:
            the rows by rank, and the ranks whose messages do not fit their seals.
        """
        each = like.shape[1] * like.element_size()
        parts = data.split([size for count in received if count for size in (count * each, SIZE)])
        rows = torch.cat([data[:0], *parts[::2]]).view(like.dtype).view(-1, like.shape[1])
        rank = torch.tensor([rank for rank, count in enumerate(received) if count], dtype=torch.int64, device=data.device)
        found = torch.cat([data[:0], *parts[1::2]]).view(torch.int64).view(-1, 2)
        sender = torch.arange(len(received), dtype=torch.int64, device=data.device)
        expected = self._seals(rows, received, sender, torch.full_like(sender, self.rank))
        return rows, rank[(found != expected[rank]).any(1)].tolist()

    def _seals(self, data: Tensor, counts: Sequence[int], sender: Tensor, receiver: Tensor) -> Int[Tensor, "ranks 2"]:
        count = torch.tensor(counts, dtype=torch.int64, device=data.device)
        what = self.what + sender * _BY_SENDER + receiver * _BY_RECEIVER + count * _BY_ROWS
        message = torch.arange(len(counts), dtype=torch.int64, device=data.device).repeat_interleave(
            count, output_size=len(data)
        )
        place = torch.arange(len(data), dtype=torch.int64, device=data.device) - (count.cumsum(0) - count)[message]
        words = data.view(_WORDS[data.element_size()]).sum(1, dtype=torch.int64)
        total = torch.zeros_like(count).index_add_(0, message, words * (place * 2 * _BY_PLACE + 1))
        return torch.stack([what, total], 1)
