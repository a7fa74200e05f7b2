"""The first, small exchange of a call: every rank learns whether all ranks agree, before anyone waits for data."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hyperattention.distributed.group import Group

# words of 8 bytes: numbers, then the text of an error
_NUMBERS, _TEXT = 24, 80


@dataclass(frozen=True)
class Header:
    """What a rank tells of its arguments.

    Args:
        tokens: tokens of this rank.
        same: what must be the same on every rank, by name.
        error: why this rank refused its arguments; empty if it did not.
    """

    tokens: int
    same: dict[str, int]
    error: str = ""

    def _words(self) -> list[int]:
        text = self.error.encode()[: 8 * _TEXT]
        padded = text + b"\0" * (8 * _TEXT - len(text))
        numbers = [bool(text), self.tokens, *self.same.values()]
        numbers += [0] * (_NUMBERS - len(numbers))
        return numbers + list(struct.unpack(f"<{_TEXT}q", padded))


def agree(group: Group, own: Header) -> list[int]:
    """Exchange headers: all ranks go on, or all raise.

    Args:
        group: the ranks.
        own: the header of this rank.

    Returns:
        tokens of each rank; nothing for a rank that refused its arguments, which raises its own error.

    Raises:
        ValueError: if another rank refused its arguments, or ranks differ in what must be the same.
    """
    words = torch.tensor(own._words(), dtype=torch.int64, device=group.device)
    found = group.gather("headers", words).tolist()
    if own.error:
        # this rank raises its own error
        return []
    for rank, other in enumerate(found):
        if other[0]:
            why = f"rank {rank} of {group.size} refused its arguments ({_text(other)})"
            raise ValueError(f"{why}: call again with other arguments on that rank; no rank has gone on")
    for place, name in enumerate(own.same, 2):
        values = [other[place] for other in found]
        if len(set(values)) > 1:
            raise ValueError(f"{name} differs between the ranks: {_shown(name, values)}; give all ranks the same {name}")
    return [other[1] for other in found]


def _text(words: Sequence[int]) -> str:
    return struct.pack(f"<{_TEXT}q", *words[_NUMBERS:]).rstrip(b"\0").decode(errors="replace")


def _shown(name: str, values: list[int]) -> str:
    """Show numbers that a user knows, and of others which ranks have the same."""
    if max(values) < 2**48 and min(values) >= 0 and name != "scale":
        return ", ".join(map(str, values))
    kinds = {value: place for place, value in enumerate(dict.fromkeys(values), 1)}
    return ", ".join(f"rank {rank} has kind {kinds[value]}" for rank, value in enumerate(values))
