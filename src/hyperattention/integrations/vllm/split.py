"""The rows of one step of the engine: which queries are approximated, and which are exact."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Consecutive queries of one request that are computed in the same way.

    Args:
        request: number of the request in the batch.
        first: row of the first query in the batch.
        count: number of queries.
        keys: number of keys that the last query sees.
    """

    request: int
    first: int
    count: int
    keys: int


@dataclass(frozen=True)
class Split:
    """All queries of a step, by how they are computed.

    Args:
        approximate: pieces for the method; no request has two.
        selected: requests that generate one token and read their best pages.
        exact: pieces for exact attention, in the order of the rows; no request has two.
        decoding: number of requests that generate and are computed exactly.
        short: number of requests whose queries are of a prompt, all at positions that are computed exactly.
    """

    approximate: tuple[Piece, ...]
    selected: tuple[Piece, ...]
    exact: tuple[Piece, ...]
    decoding: int
    short: int


def split_step(
    starts: Sequence[int],
    lengths: Sequence[int],
    prefilling: Sequence[bool],
    min_length: int | None,
    decode_from: int | None = None,
) -> Split:
    """Decide by the position of each query alone, so that neither chunk nor batch changes which queries are approximated.

    Args:
        starts: where the queries of each request begin in the batch, and where the last end.
        lengths: keys of each request, those of its queries included.
        prefilling: whether the queries of each request are of its prompt.
        min_length: position from which on queries of a prompt are approximated; None for never.
        decode_from: number of keys from which on a request that generates reads its best pages; None for never.

    Returns:
        the pieces.
    """
    approximate, selected, exact, decoding, short = [], [], [], 0, 0
    for request, (keys, prompt) in enumerate(zip(lengths, prefilling, strict=True)):
        first, count = starts[request], starts[request + 1] - starts[request]
        if not count:
            continue
        before = keys - count
        # several queries of a request that generates are tokens computed again, or proposed by another model
        if not prompt and count == 1 and decode_from is not None and keys >= decode_from:
            selected.append(Piece(request, first, count, keys))
            continue
        head = min(count, max(0, min_length - before)) if prompt and min_length is not None else count
        if head:
            exact.append(Piece(request, first, head, before + head))
        if head < count:
            approximate.append(Piece(request, first + head, count - head, keys))
        decoding += not prompt
        short += bool(prompt) and head == count
    return Split(tuple(approximate), tuple(selected), tuple(exact), decoding, short)
