"""The methods, stages and densities that plans and graphs can hold."""

from hyperattention.files.fields import Field
from hyperattention.files.part_table import PartTable
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.exact import Exact
from hyperattention.methods.lev_attention import LevAttention
from hyperattention.methods.method import Method
from hyperattention.methods.oracle import TopKeys
from hyperattention.methods.pooled_chunks import PooledChunks
from hyperattention.methods.presets import HyperAttention
from hyperattention.methods.scatterbrain import Scatterbrain
from hyperattention.rivals.anti_diagonal import AntiDiagonal
from hyperattention.rivals.budgeted_draw import BudgetedDraw
from hyperattention.rivals.collision_draw import CollisionDraw
from hyperattention.rivals.priority_draw import PriorityDraw
from hyperattention.rivals.vertical_slash import VerticalSlash
from hyperattention.select.density import Uniform
from hyperattention.select.draw import Draw
from hyperattention.select.draw_alike import DrawAlike
from hyperattention.select.locate.hash_buckets import HashBuckets
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.top_blocks import TopBlocks
from hyperattention.select.locate.universal_set import UniversalSet
from hyperattention.select.locate.window import Window
from hyperattention.select.score.block_score import BlockScore
from hyperattention.select.score.blocks import KeyBounds, KeySketch, MeanKey
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.key_scan import KeyScan
from hyperattention.select.score.level import Level
from hyperattention.select.score.leverage_score import LeverageScore
from hyperattention.select.score.mix import Mix
from hyperattention.select.score.pooling import Coarse
from hyperattention.select.score.representatives import Representatives
from hyperattention.select.score.value_norm import ValueNorm

# a new type needs a line here
_TYPES = (
    AntiDiagonal,
    BlockScore,
    BudgetedDraw,
    Coarse,
    CollisionDraw,
    Draw,
    DrawAlike,
    Exact,
    HashBuckets,
    HierarchicalSearch,
    HyperAttention,
    KeyBounds,
    KeyScan,
    KeySketch,
    LevAttention,
    Level,
    LeverageScore,
    MeanKey,
    Method,
    Mix,
    PooledChunks,
    PriorityDraw,
    Representatives,
    Scatterbrain,
    Sinks,
    TopBlocks,
    TopKeys,
    Uniform,
    UniversalSet,
    ValueNorm,
    VerticalSlash,
    Window,
)
_SPREAD = {"Method": "stages", "Mix": "parts", "Scatterbrain": "stages"}
METHODS = PartTable(_TYPES, _SPREAD)
# a plan has a method for each head itself; one call may be by head as well
METHODS_OF_CALLS = PartTable((*_TYPES, ByHead), _SPREAD)


def method_to_json(method: object) -> object:
    """Convert a method, or a part of one, to JSON values.

    Args:
        method: the method or part.

    Returns:
        nested objects, each with the name of its type; a part whose type is not in the table raises TypeError.

    Example:
        >>> method_to_json(Draw(688))
        {'type': 'Draw', 'num': 688, 'by': {'type': 'Uniform'}}
    """
    return METHODS.write(method)


def method_from_json(field: Field) -> AttentionMethod:
    """Build a method from the result of `method_to_json`.

    Args:
        field: the field with the method.

    Returns:
        the method; any other value, an unknown type or a wrong argument raises ValueError.
    """
    method = METHODS.read(field)
    if not isinstance(method, AttentionMethod):
        field.refuse("it must be a method, such as Exact or Method")
    return method
