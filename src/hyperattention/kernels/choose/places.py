"""What the edges of tiles depend on beside masked keys: numbers that the host knows."""

from dataclasses import dataclass

# numbers of a tile that `place_tiles` writes one after another for all tiles, and its edges, which stand together
COLUMNS, EDGES = 10, 5


@dataclass(frozen=True)
class Places:
    """Where tiles lie, and which keys are taken by position.

    Args:
        batch: batch rows.
        kv_heads: kv heads.
        group: query heads of each.
        tiles: tiles of the call.
        size: positions in a tile.
        first: number of the first tile.
        front: padding rows before the first query.
        queries: queries of a head.
        keys: keys of a head, masked ones too.
        length: tiles of a span of queries.
        step: tiles from one span to the next.
        prefix: leading keys that are taken.
        before: keys before a tile that a window takes.
        after: those behind it, without a causal mask.
        causal: whether a query sees only keys at or before its position.
        window: whether there is a window.
    """

    batch: int
    kv_heads: int
    group: int
    tiles: int
    size: int
    first: int
    front: int
    queries: int
    keys: int
    length: int
    step: int
    prefix: int
    before: int
    after: int
    causal: bool
    window: bool
