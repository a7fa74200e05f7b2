"""What others choose keys by, each listing at most a given number of keys a query."""

from hyperattention.bench.rows import Row
from hyperattention.method import Method
from hyperattention.select.density import Density
from hyperattention.select.draw import Draw
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.top_blocks import TopBlocks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.block_score import BlockScore
from hyperattention.select.score.blocks import BlockRank, KeyBounds, MeanKey

_TILE, _SINKS, _WINDOW, _BLOCK = 64, 16, 256, 32
_LEAST = 512


def rivals(slots: int) -> tuple[Row, ...]:
    """List published ways to choose keys, as far as stages for them exist.

    Args:
        slots: most keys a query lists.

    Returns:
        a row each, named without its budget; labels with "oracle" in them are no methods, but bounds on what one can do.

    Raises:
        ValueError: if there are too few slots to choose with.
    """
    if slots < _LEAST:
        raise ValueError(f"{slots} slots: rivals need {_LEAST} or more to choose with; name larger budgets")
    left = slots - _SINKS - _TILE - _WINDOW

    def ranked(by: BlockRank) -> Method:
        return Method(Sinks(_SINKS), Window(_WINDOW), TopBlocks(left // _BLOCK, _BLOCK, by), tile=_TILE)

    def drawn(by: Density) -> Method:
        return Method(Sinks(_SINKS), Window(_WINDOW), Draw(left, by=by), tile=_TILE)

    return (
        Row("top_blocks_mean", "top blocks by mean key", ranked(MeanKey())),
        Row("top_blocks_bounds", "top blocks by key bounds (Quest)", ranked(KeyBounds())),
        Row("block_draws", "draws by block score", drawn(BlockScore(_BLOCK))),
    )
