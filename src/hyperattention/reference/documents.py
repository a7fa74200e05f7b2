"""Long documents with facts to retrieve: real text with set and get lines at random places.

A line ``#set abc=1234`` sets a fact; a later line ``#get abc=1234`` asks for it. The digits cannot be predicted from the
key, so a model can answer only by attending to the line that set them, at any distance. The rest of the document is ordinary
text, so one pass measures both language modelling and retrieval.
"""

import random
from dataclasses import dataclass

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS_SIZE = 4


@dataclass(frozen=True)
class Document:
    """One document as bytes, with the place of every answer.

    Args:
        data: the document, of exactly the requested length.
        answer_index: position of the first digit of each answer, ascending.
        answer_distance: for each answer, the distance in bytes to the digits that set it.
    """

    data: bytes
    answer_index: tuple[int, ...]
    answer_distance: tuple[int, ...]

    @property
    def answer_size(self) -> int:
        """The number of digits of each answer."""
        return _DIGITS_SIZE


def make_document(text: bytes, length: int, num_pairs: int, rng: random.Random, min_distance: int = 0) -> Document:
    """Insert `num_pairs` set and get lines into `text`, at distances spread evenly over the possible range.

    Args:
        text: ordinary text, at least `length` bytes; only its first bytes are used.
        length: bytes of the result.
        num_pairs: number of facts that are set and asked for.
        rng: the random generator for keys, digits and places.
        min_distance: approximate smallest distance in bytes between a fact and its question.

    Returns:
        the document; pairs that line breaks moved past its end are not among the answers.

    Raises:
        ValueError: if `text` is shorter than `length`.
    """
    if len(text) < length:
        raise ValueError(f"text has {len(text)} bytes, but the document needs {length}: give a longer text")
    line_size = len("#set abc=") + _DIGITS_SIZE + 1
    body = text[: max(0, length - 2 * num_pairs * line_size)]
    events: list[tuple[float, int, str, str, str]] = []
    keys = rng.sample([a + b + c for a in _LETTERS for b in _LETTERS for c in _LETTERS], num_pairs)
    share = min(0.9, min_distance / length)
    for pair, key in enumerate(keys):
        digits = "".join(rng.choice("0123456789") for _ in range(_DIGITS_SIZE))
        # first a distance from an even spread, then a place where the distance fits
        distance = share + (pair + rng.random()) / num_pairs * (0.98 - share)
        place = rng.random() * (0.99 - distance)
        events.append((place, 2 * pair, "set", key, digits))
        events.append((place + distance, 2 * pair + 1, "get", key, digits))
    pieces: list[bytes] = []
    done = total = 0
    set_at: dict[str, int] = {}
    answers: list[tuple[int, int]] = []
    for place, _, verb, key, digits in sorted(events):
        target = max(done, int(place * len(body)))
        cut = body.find(b"\n", target) + 1 or len(body)
        # a very long line is cut at the event, because moving the event to its end would move all later events
        cut = cut if cut - target < 400 else target
        pieces.append(body[done:cut])
        total += cut - done
        done = cut
        line = f"#{verb} {key}={digits}\n".encode()
        digits_at = total + line_size - 1 - _DIGITS_SIZE
        if verb == "set":
            set_at[key] = digits_at
        elif digits_at + _DIGITS_SIZE <= length:
            answers.append((digits_at, digits_at - set_at[key]))
        pieces.append(line)
        total += len(line)
    pieces.append(text[done : done + max(0, length - total)])
    return Document(b"".join(pieces)[:length], tuple(a for a, _ in answers), tuple(d for _, d in answers))
