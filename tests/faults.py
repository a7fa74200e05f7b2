"""Faults planted in the messages of one rank: what it hands to the wire is damaged, lost, cut, longer or another message."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Fault:
    """What becomes of a rank's messages.

    Args:
        at: number of the exchange of a call, from 0, the headers.
        spoil: changes the messages by rank; it also gets the last message to each rank before.
    """

    at: int
    spoil: Callable[[list[Tensor], dict[int, Tensor]], None]

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Plant the fault in this process."""
        real, number = dist.all_to_all_single, 0
        before: dict[int, Tensor] = {}

        def exchange(out: Tensor, data: Tensor, into: Sequence[int], sent: Sequence[int], **options) -> object:
            nonlocal number
            messages = [each.clone() for each in data.split(list(sent))]
            if number == self.at:
                self.spoil(messages, before)
            before.update((rank, each) for rank, each in enumerate(data.split(list(sent))) if len(each))
            number += 1
            return real(out, torch.cat(messages), list(into), list(map(len, messages)), **options)

        with mock.patch.object(dist, "all_to_all_single", exchange):
            yield


def flipped(messages: list[Tensor], before: dict[int, Tensor]) -> None:
    """Change one bit of the last message."""
    last = [each for each in messages if len(each)][-1]
    last[len(last) // 3] ^= 16


def swapped(messages: list[Tensor], before: dict[int, Tensor]) -> None:
    """Give two ranks each other's messages."""
    first, second = [rank for rank, each in enumerate(messages) if len(each)][:2]
    messages[first], messages[second] = messages[second], messages[first]


def repeated(messages: list[Tensor], before: dict[int, Tensor]) -> None:
    """Send the message before once more, as far as it reaches."""
    for rank, each in enumerate(messages):
        if len(each):
            size = min(len(each), len(before[rank]))
            each[:size] = before[rank][:size]


def shortened(messages: list[Tensor], before: dict[int, Tensor]) -> None:
    """Leave out the end."""
    messages[:] = [each[: max(0, len(each) - 32)] for each in messages]


def lengthened(messages: list[Tensor], before: dict[int, Tensor]) -> None:
    """Send something more."""
    messages[:] = [torch.cat([each, each[:32]]) for each in messages]


def lost(messages: list[Tensor], before: dict[int, Tensor]) -> None:
    """Send nothing."""
    messages[:] = [each[:0] for each in messages]


def raised(messages: list[Tensor], before: dict[int, Tensor]) -> None:
    """Fail in the middle of a call."""
    raise MemoryError("planted")
