"""Published methods for selecting keys, each at the same number of slots, for comparison with this project's methods."""

from hyperattention.bench.rows import Row
from hyperattention.methods.method import Method
from hyperattention.methods.oracle import TopKeys
from hyperattention.methods.scatterbrain import Scatterbrain
from hyperattention.rivals.anti_diagonal import AntiDiagonal
from hyperattention.rivals.budgeted_draw import BudgetedDraw
from hyperattention.rivals.collision_draw import CollisionDraw
from hyperattention.rivals.priority_draw import PriorityDraw
from hyperattention.rivals.vertical_slash import VerticalSlash
from hyperattention.select.draw import Draw
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.top_blocks import TopBlocks
from hyperattention.select.locate.universal_set import UniversalSet
from hyperattention.select.locate.window import Window
from hyperattention.select.score.block_score import BlockScore
from hyperattention.select.score.blocks import KeyBounds, MeanKey
from hyperattention.select.stage import Stage

_TILE, _SINKS, _WINDOW = 64, 16, 256
# with fewer slots, a rival could choose only very few blocks
LEAST = 512
# blocks of 16 keys gave smaller errors than blocks of 64 for every ranking, on structured inputs
_BLOCK = 16
# a feature costs as much as a slot; with 64 of them, and as wide heads, a listed key that is subtracted costs two
_FEATURES = 64


def rivals(slots: int) -> tuple[Row, ...]:
    """List the rivals: each has sinks and a window, except the oracle, and uses all other slots for its own selection.

    Parameters that the papers leave open, or set for single queries, are the best of a few values tried on structured
    inputs of 8,192 tokens at 1,024 slots.

    Args:
        slots: largest number of keys listed for a query.

    Returns:
        a row for each method, the oracle last.

    Raises:
        ValueError: if there are too few slots.
    """
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < LEAST:
        raise ValueError(f"rivals(slots={slots!r}): give an integer of {LEAST} slots or more")
    rest = slots - _SINKS - _WINDOW - _TILE
    blocks, some = rest // _BLOCK, rest // 2 // _BLOCK
    slashes = (rest - 32) // _TILE
    collisions, budget = CollisionDraw(rest, bits=6, tables=100), BudgetedDraw(rest - some * _BLOCK, epsilon=0.01)
    return (
        _row("mean_key_blocks", "top blocks by mean key (MInference, block)", TopBlocks(blocks, _BLOCK, MeanKey())),
        _row("key_bound_blocks", "top blocks by key bounds (Quest)", TopBlocks(blocks, _BLOCK, KeyBounds())),
        _row("anti_diagonal", "top blocks by anti-diagonals (XAttention)", AntiDiagonal(blocks, _BLOCK)),
        _row("vertical_slash", "verticals and slashes (MInference)", VerticalSlash(rest - slashes * _TILE, slashes)),
        _row(
            "universal_set", "universal set + uniform draws (LevAttention)", UniversalSet(rest // 4), Draw(rest - rest // 4)
        ),
        _row("block_score", "draws by block score (importance sampling)", Draw(rest, by=BlockScore(_BLOCK))),
        _row("collisions", "draws by hash collisions (MagicPIG)", collisions),
        _row("budgeted", "top blocks + budgeted draws (vAttention)", TopBlocks(some, _BLOCK), budget),
        _row("priority", "priority draws by pooled queries (Zharkov et al.)", PriorityDraw(rest)),
        Row("scatterbrain", "top blocks + random features (Scatterbrain)", _scatterbrain(rest)),
        Row("top_keys", "each query's own top keys (oracle)", TopKeys(slots)),
    )


def _scatterbrain(rest: int) -> Scatterbrain:
    """Use the slots for blocks and features; what makes no further block is added to the window."""
    blocks, left = divmod(rest - _FEATURES, 2 * _BLOCK)
    stages = Sinks(_SINKS), Window(_WINDOW + left), TopBlocks(blocks, _BLOCK)
    return Scatterbrain(*stages, num_features=_FEATURES, tile=_TILE)


def _row(name: str, label: str, *stages: Stage) -> Row:
    return Row(name, label, Method(Sinks(_SINKS), Window(_WINDOW), *stages, tile=_TILE))
