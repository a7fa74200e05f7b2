"""Long documents with something to look up: real text with set and get lines scattered through it.

A line ``#set abc=1234`` plants a fact; a later line ``#get abc=1234`` asks for it. Four digits cannot be guessed from the
key, so a model answers only by attending to the line that set them, however far back it stands. The rest of the document
is ordinary text, so that the same pass measures language modelling and retrieval.
"""

import random
from dataclasses import dataclass

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS_SIZE = 4


@dataclass(frozen=True)
class Document:
    """One document as bytes, with the place of every answer.

    Args:
        data: the document, exactly as long as was asked for.
        answer_index: position of the first digit of each answer, ascending.
        answer_distance: for each answer, how many bytes earlier the digits were set.
    """

    data: bytes
    answer_index: tuple[int, ...]
    answer_distance: tuple[int, ...]

    @property
    def answer_size(self) -> int:
        """Digits in each answer."""
        return _DIGITS_SIZE


def make_document(text: bytes, length: int, num_pairs: int, rng: random.Random, min_distance: int = 0) -> Document:
    """Scatter `num_pairs` set and get lines through `text`, at distances spread evenly over what the length allows.

    Args:
        text: ordinary text, at least `length` bytes; only its beginning is used.
        length: bytes in the result.
        num_pairs: facts planted and asked for.
        rng: the source of keys, digits and places.
        min_distance: no answer is asked for closer to its fact than this many bytes, roughly.

    Returns:
        the document; pairs that line breaks pushed past its end are left out of the answers.

    Raises:
        ValueError: if `text` is shorter than `length`.
    """
    if len(text) < length:
        raise ValueError(f"text has {len(text)} bytes and the document needs {length}: give a longer text")
    line_size = len("#set abc=") + _DIGITS_SIZE + 1
    body = text[: max(0, length - 2 * num_pairs * line_size)]
    events: list[tuple[float, int, str, str, str]] = []
    keys = rng.sample([a + b + c for a in _LETTERS for b in _LETTERS for c in _LETTERS], num_pairs)
    share = min(0.9, min_distance / length)
    for pair, key in enumerate(keys):
        digits = "".join(rng.choice("0123456789") for _ in range(_DIGITS_SIZE))
        # an even spread of distances: the distance first, then a place where it fits
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
        # a very long line: cut it where the event falls rather than push every later event away
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
